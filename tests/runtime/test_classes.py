"""The class that stands for a converted model, made of the library's own."""

from __future__ import annotations

from typing import Any


def test_the_runtime_class_is_made_once_per_architecture() -> None:
    from transformers import GPT2LMHeadModel

    from normconvert import runtime

    assert runtime.GPT2LMHeadModel is runtime.converted_class(GPT2LMHeadModel)
    assert issubclass(runtime.GPT2LMHeadModel, GPT2LMHeadModel)
    assert not hasattr(runtime, "NoSuchModel")
    assert not hasattr(runtime, "GPT2Config")  # not a model


def test_the_library_treats_the_class_as_its_own() -> None:
    """As custom code it would miss the library's renaming of weights; a second subclass could not be pickled."""
    from transformers import GPT2LMHeadModel, WhisperForConditionalGeneration
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    from normconvert.runtime import converted_class

    for base in (GPT2LMHeadModel, WhisperForConditionalGeneration):
        made: Any = converted_class(base)
        assert not getattr(made, "is_custom_code", bool)()  # of later releases
        assert add_generation_mixin_to_remote_model(made) is made
