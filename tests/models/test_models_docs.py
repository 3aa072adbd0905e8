"""The examples in the docstrings of `ppmoe_models` run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import ppmoe_models

MODULES = sorted(each.name for each in pkgutil.iter_modules(ppmoe_models.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"ppmoe_models.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", ppmoe_models.__all__)
def test_public_names_are_described(name: str) -> None:
    described = getattr(ppmoe_models, name)
    assert described.__doc__
    if name not in ("MoELosses", "LanguageModelOutput"):  # results; their makers have examples
        assert ">>> " in described.__doc__
