"""Training: one loop for pretraining, midtraining, SFT and DPO, and the four stages that use it.

`loop.train` is the step on one screen; `pretrain`, `sft` and `dpo` are stages; the rest are parts.
"""
