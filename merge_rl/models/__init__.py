"""Networks and autoencoders: adapters of published architectures."""

from merge_rl.models.lora import add_adapters, plain_state_dict

__all__ = ["add_adapters", "plain_state_dict"]
