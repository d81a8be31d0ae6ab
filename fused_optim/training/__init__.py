"""Training with these optimizers; :mod:`fused_optim.training.pretrain` is all of it in one command."""
