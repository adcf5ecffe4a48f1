"""``perceive-adapter finetune``: stage 2, from a trained backbone to a saved adapter."""

from __future__ import annotations

import json
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceive_adapter.cli.backbones import add_backbone, load_network, side_by_side
from perceive_adapter.cli.finetune_data import LARGEST, find_data
from perceive_adapter.cli.finetune_plan import make_data, make_recipe, options_of
from perceive_adapter.cli.options import (
    between,
    integer,
    name_or_path,
    needs,
    rate,
    read_path,
    say,
    with_progress,
)
from perceive_adapter.errors import ConfigError, UnseenTaskWarning

if TYPE_CHECKING:
    from accelerate import Accelerator

    from perceive_adapter.cli.finetune_data import TrainingFiles
    from perceive_adapter.data.restoration import RestorationData
    from perceive_adapter.injection.model import PerceiveModel
    from perceive_adapter.training.mediums import MediumSource

NAME = "finetune"
SUMMARY = "Train an adapter for a frozen backbone, on pairs or on clean photographs"

_LONGEST = 10**9  # steps
_TASKS = ["gaussian_noise", "rain", "haze", "low_light"]


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "Killed at any moment, the same command goes on from DIR/checkpoints and ends with the "
        "same weights. On several GPUs: accelerate launch -m perceive_adapter finetune ... "
        "Exit code: 0 trained and saved; 2 nothing could be done."
    )
    add = parser.add_argument
    add_backbone(parser)
    add(
        "--data",
        metavar="DIR",
        type=read_path,
        nargs="+",
        required=True,
        help="folders of pairs (input and gt, hazy and clear, ..., at any depth), of WebDataset "
        "shards with them, or else of clean photographs, which are degraded while they are drawn; "
        "one in ten is set aside",
    )
    add("--out", metavar="DIR", type=read_path, required=True, help="where the adapter is saved")
    add(
        "--tasks",
        nargs="+",
        metavar="NAME",
        default=_TASKS,
        help="degradations of clean photographs, with + for mixtures (gaussian_noise rain haze "
        "low_light)",
    )
    add(
        "--ratios",
        nargs="+",
        metavar="TASK=R",
        default=[],
        help="how often a task, or a folder of pairs by its name, is drawn beside the others (1)",
    )
    add(
        "--broken",
        choices=("raise", "skip"),
        default="raise",
        help="what to do with files without a partner and images that cannot be read",
    )
    _add_adapter(parser)
    _add_recipe(parser)
    _add_machine(parser)


def _add_adapter(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("the adapter").add_argument
    add(
        "--adapter",
        metavar="NAME_OR_FOLDER",
        type=name_or_path,
        help="a saved adapter, here or on the Hub, to train further",
    )
    add(
        "--perceiver",
        metavar="NAME_OR_FOLDER",
        type=name_or_path,
        help="what steers it (perceive-tiny)",
    )
    add("--rank", type=integer(1, 512), metavar="N", help="of the branches (as the budget allows)")
    add(
        "--treat",
        nargs="+",
        metavar="NAME",
        default=["auto"],
        help="degradations that the adapter works on, and leaves the backbone alone otherwise: "
        "auto (default) finds what the data has and the backbone cannot undo, or keeps what "
        "--adapter treats; everywhere: no limit",
    )


def _add_recipe(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("how long and how fast").add_argument
    side = integer(16, 2048)
    add("--steps", type=integer(1, _LONGEST), default=10_000, metavar="N", help="(10000)")
    add("--batch", type=integer(1, 4096), default=8, metavar="N", help="samples of a step (8)")
    add("--accumulate", type=integer(1, 4096), default=1, metavar="N", help="passes of a step (1)")
    add("--context", type=side, default=256, metavar="PX", help="crops that are perceived (256)")
    add("--patch", type=side, default=128, metavar="PX", help="part that is restored (128)")
    add("--learning-rate", type=rate, default=2e-3, metavar="R", help="at its highest (2e-3)")
    add("--final-learning-rate", type=rate, default=2e-5, metavar="R", help="at the end (2e-5)")
    add("--ema", type=between(0, 1), default=0.0, metavar="D", help="decay of averaged weights (0)")
    weight = between(0, 1e6)
    add(
        "--contrastive",
        type=weight,
        default=0.0,
        metavar="W",
        help="beside L1's 1 (0; the paper's 0.1)",
    )
    add("--clip-aware", type=weight, default=0.0, metavar="W", help="(0; the paper's 0.05)")
    add("--difficulty-adaptive", type=weight, default=0.0, metavar="W", help="(0; the paper's 0.1)")
    add(
        "--mediums",
        nargs="+",
        metavar="WHAT",
        type=name_or_path,
        default=[],
        help="what half-restores images for the difficulty-adaptive loss, beside folders whose "
        "names begin with medium: checkpoints or code as for --backbone, and earlier, for the "
        "adapter's own past",
    )
    add("--seed", type=integer(0, 2**31 - 1), default=0, metavar="N", help="of all that is random")


def _add_machine(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("the machine").add_argument
    add(
        "--precision",
        choices=("no", "bf16", "fp16"),
        help="of autocast (as accelerate is configured; no)",
    )
    add("--compile", action="store_true", help="run through torch.compile")
    add("--channels-last", action="store_true", help="keep images and weights channels last")
    add("--workers", type=integer(0, 256), default=0, metavar="N", help="drawing samples (0)")
    add("--checkpoint-every", type=integer(1, _LONGEST), default=500, metavar="N", help="(500)")
    add("--cpu", action="store_true", help="do not use a GPU")


def run(arguments: Namespace) -> int:
    """Train, measure on what was set aside, and save an adapter."""
    needs("accelerate", "torchmetrics", extra="train")
    from accelerate import Accelerator

    from perceive_adapter.data.restoration import check_tasks
    from perceive_adapter.training.restoration import check_patch
    from perceive_adapter.training.runs import claim_folder
    from perceive_adapter.training.stage2 import objective_for, train_restoration

    # What may be wrong with the options shows before all of the data is read.
    recipe = make_recipe(arguments)
    check_tasks(arguments.tasks)
    mediums = _mediums(arguments)
    accelerator = Accelerator(
        mixed_precision=arguments.precision, cpu=arguments.cpu, **_logged(arguments)
    )
    model = _wrapped(arguments).to(accelerator.device)
    objective = objective_for(model, recipe.weights)
    check_patch(model, arguments.patch)
    found = find_data(arguments.data, arguments.broken)
    _check_photos(arguments.tasks, found)
    data = make_data(found, arguments)
    options = options_of(arguments, recipe, found, model, mediums, accelerator.mixed_precision)
    with accelerator.main_process_first():
        checkpoints = claim_folder(arguments.out, options)
    if arguments.treat == ["auto"] and arguments.adapter is None:  # a saved one keeps its own
        _treat_by_itself(model, data, checkpoints / "treated.json", accelerator)
    if accelerator.is_main_process:
        _introduce(model, data, found)
    accelerator.init_trackers("finetune")
    train_restoration(
        model,
        data,
        recipe=recipe,
        objective=objective,
        mediums=mediums,
        accelerator=accelerator,
        checkpoint=checkpoints / "stage2.pt",
        every=arguments.checkpoint_every,
        workers=arguments.workers,
        compile=arguments.compile,
        channels_last=arguments.channels_last,
    )
    _save(arguments, model, found, accelerator)
    accelerator.end_training()
    return 0


def _check_photos(tasks: list[str], found: TrainingFiles) -> None:
    if tasks != _TASKS and not found.photos:
        raise ConfigError(
            f"--tasks {' '.join(tasks)} names degradations of clean photographs, and --data holds "
            "pairs alone, whose tasks are their folders' names. Leave it out, or add photographs."
        )


def _mediums(arguments: Namespace) -> list[MediumSource]:
    """Load what half-restores images."""
    from perceive_adapter.training.mediums import EARLIER

    if arguments.mediums and not arguments.difficulty_adaptive:
        raise ConfigError(
            "--mediums are for the difficulty-adaptive loss: leave them out, or give it a weight, "
            "as with --difficulty-adaptive 0.1."
        )
    told: list[str] = arguments.mediums
    return [EARLIER if name == EARLIER else load_network(name, "--mediums") for name in told]


def _wrapped(arguments: Namespace) -> PerceiveModel:
    """Wrap the backbone with a new adapter, or with a saved one to train further."""
    from accelerate.utils import set_seed

    from perceive_adapter import AdapterConfig, wrap

    if "auto" in arguments.treat and len(arguments.treat) > 1:
        raise ConfigError(
            f"--treat {' '.join(arguments.treat)}: auto stands alone. Name degradations, or auto."
        )
    set_seed(arguments.seed)
    backbone = load_network(arguments.backbone)
    if arguments.adapter is None:
        config = AdapterConfig(rank=arguments.rank)
        model = wrap(backbone, config=config, perceiver=arguments.perceiver)
    else:
        given = [name for name in ("perceiver", "rank") if getattr(arguments, name) is not None]
        if given:
            raise ConfigError(f"--adapter brings its own {' and '.join(given)}: leave that out.")
        model = wrap(backbone, arguments.adapter, is_trainable=True)
    if arguments.treat != ["auto"]:
        model.treat(*(() if arguments.treat == ["everywhere"] else arguments.treat))
    return model


def _treat_by_itself(
    model: PerceiveModel, data: RestorationData, file: Path, accelerator: Accelerator
) -> None:
    """Let the adapter treat what it should; what was found once counts for the whole run."""
    from perceive_adapter.folders import write_json
    from perceive_adapter.training.treated import find_treated

    begun = any(file.parent.glob("*.pt"))
    if accelerator.is_main_process and not (begun and file.exists()):
        with warnings.catch_warnings(record=True) as told:
            write_json(file, {"treated": find_treated(model, data)})
        for one in told:
            if issubclass(one.category, UnseenTaskWarning):
                say(f"Note: {one.message}.")
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    accelerator.wait_for_everyone()
    model.treat(*json.loads(file.read_text(encoding="utf-8"))["treated"])


def _logged(arguments: Namespace) -> dict[str, Any]:
    """Log to TensorBoard, where it is installed."""
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        return {}
    return {"log_with": "tensorboard", "project_dir": str(arguments.out / "logs")}


def _introduce(model: PerceiveModel, data: RestorationData, found: TrainingFiles) -> None:
    """Say what is trained, on what, and what was skipped."""
    status = model.status()
    limits = "works on every image" if status.treats is None else "leaves other images alone"
    say(f"{status}; {limits}.")
    say(
        f"Tasks: {', '.join(data.tasks)}. {len(found.pairs)} pairs and {len(found.photos)} "
        f"photographs to train on; {len(found.held_pairs)} and {len(found.held_photos)} set aside."
    )
    if found.skipped:
        say(f"Skipped {len(found.skipped)} files, such as: {found.skipped[0]}.")


def _save(
    arguments: Namespace, model: PerceiveModel, found: TrainingFiles, accelerator: Accelerator
) -> None:
    """Save the adapter, measure it on what was set aside, and put the figures into its card."""
    from perceive_adapter.evaluation.measure import compare
    from perceive_adapter.evaluation.report import group_means, table
    from perceive_adapter.weights import is_sharded

    sharded = any(map(is_sharded, model.parameters()))
    if sharded or accelerator.is_main_process:
        model.save_pretrained(arguments.out)
    if not accelerator.is_main_process:
        return
    print(f"Saved in {str(arguments.out)!r}.\n")
    cases = found.held_cases(arguments.tasks)
    if sharded or not cases:
        return
    model.eval()
    both = side_by_side(model, tile=LARGEST)  # pairs may be of any size, and memory is not
    measured = compare(both, with_progress(cases, "measure"), device=accelerator.device)
    print(table(measured))
    figures: dict[str, float | str] = {}
    for group, networks in group_means(measured).items():
        for name, (psnr, _) in networks.items():
            figures[f"{group}, {name}: PSNR in dB on what was set aside"] = psnr
    model.save_pretrained(arguments.out, figures=figures)
