"""Networks and autoencoders: adapters of published architectures."""

from merge_rl.models.autoencoder import LatentDecoder
from merge_rl.models.lora import add_adapters, plain_state_dict

__all__ = ["LatentDecoder", "add_adapters", "plain_state_dict"]
