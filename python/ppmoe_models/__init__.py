"""Thin `nn.Module`s over the operators of `ppmoe_ops`. None are here yet: see the README."""
