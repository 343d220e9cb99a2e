"""The lab on others' engines. Each file needs an extra of pyproject.toml, and says which if it is not there.

hf.py           Hugging Face: the model for `from_pretrained` and `generate`, the hybrid optimizer and every loss term for Trainer
distributed.py  many ranks: torchrun with DDP or FSDP2, and checkpoints that another number of ranks can read
"""
