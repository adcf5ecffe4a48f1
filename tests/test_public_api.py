"""The public API, frozen: a change here is a change for users, and belongs in CHANGELOG.md."""

import ast
import inspect
import os
import subprocess
import sys

import pytest

import perceive_adapter
from perceive_adapter import PerceiveModel, PromptInjector, QualityPerceiver, plan_sites, wrap

NAMES = [
    "AdapterConfig",
    "AdapterMismatchError",
    "AdapterStatus",
    "AlreadyWrappedError",
    "BackboneError",
    "CheckpointError",
    "CompiledBackboneError",
    "ConfigError",
    "DifficultyAdaptiveLoss",
    "ImageError",
    "ImageRangeWarning",
    "Layout",
    "LossInputError",
    "MissingDependencyError",
    "PerceiveError",
    "PerceiveModel",
    "Perceived",
    "Perception",
    "PerceptionError",
    "PromptInjector",
    "QualityPerceiver",
    "Site",
    "SiteError",
    "SitePlan",
    "TrainingError",
    "UnseenTaskWarning",
    "UntrainedPerceiverWarning",
    "ValueRange",
    "__version__",
    "plan_sites",
    "wrap",
]

MODEL_METHODS = {
    "add_adapter": "name adapter=None **hub_options",
    "delete_adapter": "name",
    "disabled": "",
    "fold": "perception",
    "forward": "*args *perception *adapter_names=None **kwargs",
    "hotswap_adapter": "pretrained name=None **hub_options",
    "load_state_dict": "*args **kwargs",
    "perceive": "image",
    "print_trainable_parameters": "",
    "push_to_hub": "repo_id *figures=None **options",
    "requires_grad_": "requires_grad=True",
    "restore": "image *tile=None *overlap=32 *batch_size=1 *perception",
    "save_pretrained": "folder *figures=None",
    "set_adapter": "name",
    "state_dict": "*args **kwargs",
    "status": "",
    "train": "mode=True",
    "treat": "*degradations",
    "trainable_parameters": "",
    "unfreeze": "*patterns",
    "unwrap": "",
}
HEAVY = ["timm", "open_clip", "torchvision", "huggingface_hub", "accelerate", "gradio", "spandrel"]


def arguments(function: object) -> list[str]:
    return [
        str(parameter.replace(annotation=parameter.empty)).replace(" ", "")
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]


def test_the_names() -> None:
    assert sorted(perceive_adapter.__all__) == NAMES
    assert dir(perceive_adapter) == NAMES
    for name in NAMES:
        assert getattr(perceive_adapter, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'warp'"):
        _ = perceive_adapter.warp


def test_the_signature_of_wrap() -> None:
    assert arguments(wrap) == [
        "backbone",
        "pretrained=None",
        "sites=None",
        "config=None",
        "perceiver=None",
        "example=None",
        "image_arg=None",
        "value_range=None",
        "semantic_weights=None",
        "is_trainable=None",
        "**hub_options",
    ]
    kinds = [p.kind.name for p in inspect.signature(wrap).parameters.values()]
    assert kinds == ["POSITIONAL_OR_KEYWORD"] * 2 + ["KEYWORD_ONLY"] * 8 + ["VAR_KEYWORD"]


def test_the_methods_of_the_model() -> None:
    own = {n for n, v in vars(PerceiveModel).items() if inspect.isfunction(v) and n[0] != "_"}
    assert own == set(MODEL_METHODS)
    properties = {n for n, v in vars(PerceiveModel).items() if isinstance(v, property)}
    assert properties == {"injector", "sites", "size_multiple"}


@pytest.mark.parametrize("method", MODEL_METHODS)
def test_the_signatures_of_the_model(method: str) -> None:
    def short(parameter: inspect.Parameter) -> str:
        stars = {"KEYWORD_ONLY": "*", "VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
        default = parameter.default
        ending = "" if default is parameter.empty or parameter.name == "perception" else default
        text = f"={ending}" if ending != "" else ""
        return stars.get(parameter.kind.name, "") + parameter.name + text

    signature = inspect.signature(getattr(PerceiveModel, method))
    found = [short(p) for p in signature.parameters.values() if p.name != "self"]
    assert " ".join(found) == MODEL_METHODS[method]


def test_the_other_entry_points() -> None:
    assert arguments(plan_sites) == [
        "backbone",
        "sites=None",
        "config=None",
        "example=None",
        "image_arg=0",
    ]
    assert arguments(PromptInjector) == ["plan", "config=None"]
    assert arguments(PromptInjector.detach) == []
    assert arguments(PromptInjector.conditioned) == ["perception"]


@pytest.mark.parametrize("access", ["", "for n in p.__all__: getattr(p, n)"])
def test_importing_is_light_and_silent(access: str) -> None:
    code = f"""
import torch, warnings
warnings.simplefilter("error")
import sys
before = set(sys.modules)
import perceive_adapter as p
{access}
print([m for m in {HEAVY} if m in set(sys.modules) - before])
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ast.literal_eval(run.stdout) == []
    assert run.stderr == ""


def test_the_methods_of_the_perceiver() -> None:
    callables = (classmethod, type(lambda: None))
    own = {n for n, v in vars(QualityPerceiver).items() if isinstance(v, callables) and n[0] != "_"}
    assert own == {
        "create",
        "embed",
        "fingerprint",
        "forward",
        "from_official_prompts",
        "from_pretrained",
        "logits",
        "push_to_hub",
        "quality_map",
        "save_pretrained",
        "text_features",
        "tier_logits",
        "tier_loss",
    }
    properties = {n for n, v in vars(QualityPerceiver).items() if isinstance(v, property)}
    assert properties == {"degradations", "embedding_dim", "tiers", "trained"}
    assert QualityPerceiver.score_range == (0.0, 1.0)
    assert QualityPerceiver.lower_better is False
