"""Fine-tuning of all weights, or of adapters, against the same rewards."""

from merge_rl.workflows.finetune import resume
from merge_rl.workflows.finetune.page import curve_label
from merge_rl.workflows.finetune.run import FinetuneResult, finetune, resume_finetune

__all__ = ["FinetuneResult", "curve_label", "finetune", "resume", "resume_finetune"]
