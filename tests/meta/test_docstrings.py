"""Every example in a docstring runs, and every public class has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from typing import Protocol

import pytest

import harness

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(harness.__path__, "harness.")
    if not module.name.endswith("__main__")
)


def _needs_an_example(value: object) -> bool:
    """A class people make or hold; an error, or a Protocol that a backend implements, is shown where it is used."""
    return inspect.isclass(value) and not issubclass(value, Exception) and Protocol not in value.__bases__


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=flags, report=True)
    assert not failed


def _has_example(public: type) -> bool:
    methods = (vars(public).get(name) for name in dir(public) if not name.startswith("_"))
    texts = (inspect.getdoc(thing) or "" for thing in (public, *methods))
    return any(doctest.DocTestParser().get_examples(text) for text in texts)


@pytest.mark.parametrize("package", ["harness", "harness.testing"])
def test_every_public_class_has_an_example(package: str) -> None:
    offered = importlib.import_module(package)
    public = {name: getattr(offered, name) for name in offered.__all__}
    lacking = [name for name, value in public.items() if _needs_an_example(value) and not _has_example(value)]
    assert not lacking, f"{', '.join(lacking)}: each needs a runnable example in its docstring"
