"""``perceive-adapter train-perceiver``: stage 1, audited on photographs it never saw."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perceive_adapter.cli.options import device, integer, name_or_path, rate, read_path, say
from perceive_adapter.cli.train_plan import Plan, facts_of, make_plan, options_of

if TYPE_CHECKING:
    from torch import Tensor

    from perceive_adapter.data.samples import CropSampler
    from perceive_adapter.data.triplets import Medium
    from perceive_adapter.perceiver import QualityPerceiver
    from perceive_adapter.training.runs import Split

NAME = "train-perceiver"
SUMMARY = "Train a perceiver on clean photographs, and audit it on some that it never saw"

_LARGEST = 1200  # pixels of the longest side of a photograph in training and audit
_LONGEST = 10**9  # steps
_DARK = 0.01  # share of the crops that are dark scenes


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "Killed at any moment, the same command goes on from DIR/checkpoints and ends with the "
        "same weights. Exit code: 0 trained and audited; 2 nothing could be done."
    )
    add = parser.add_argument
    add(
        "--data",
        metavar="DIR",
        type=read_path,
        required=True,
        help="clean photographs, at any depth",
    )
    add(
        "--audit-data",
        metavar="DIR",
        type=read_path,
        help="photographs to audit on; without it, one in ten of --data is set aside for that",
    )
    add("--out", metavar="DIR", type=read_path, required=True, help="where the perceiver is saved")
    add(
        "--clip",
        metavar="NAME",
        default="ViT-B-32-quickgelu",
        help="model of open_clip (default: ViT-B-32-quickgelu, the paper's), or perceive-tiny, "
        "whose towers are trained first",
    )
    add(
        "--pretrained",
        metavar="TAG_OR_FILE",
        type=name_or_path,
        default="openai",
        help="its weights: a tag of open_clip (default: openai) or a file; unused by perceive-tiny",
    )
    add(
        "--start-from",
        metavar="NAME_OR_DIR",
        type=name_or_path,
        help="with --clip perceive-tiny, the perceiver whose towers are trained further: "
        "perceive-tiny itself, or what such a command saved, with --audit-data (default: towers "
        "from scratch)",
    )
    add(
        "--medium",
        choices=("restored", "blend", "milder", "mixed"),
        default="restored",
        help="what the medium tier is: outputs of two half-trained restorers, each on photographs "
        "that it never saw, blended half with the clean image (default, after the paper), blends "
        "of degraded and clean image, milder damage, or one of the three for each scene",
    )
    add("--note", metavar="TEXT", help="what the photographs are, for the model card")
    add("--words", nargs=3, metavar=("LOW", "MEDIUM", "HIGH"), help="words the prompts start from")
    length = integer(1, 1022)
    add("--context-length", type=length, default=16, metavar="N", help="vectors in a prompt (16)")
    add(
        "--heads",
        action=BooleanOptionalAction,
        default=True,
        help="also tell which degradations an image has and how severe each is (default: yes)",
    )
    _add_schedule(parser)


def _add_schedule(parser: ArgumentParser) -> None:
    steps = integer(1, _LONGEST)
    group = parser.add_argument_group("how long and how fast")
    add = group.add_argument
    add("--steps", type=steps, metavar="N", help="of stage 1 (100000; perceive-tiny: 1000)")
    add(
        "--learning-rate",
        type=rate,
        metavar="R",
        help="at the start, above 0 and at most 1 (4e-5; perceive-tiny: 0.01)",
    )
    add(
        "--final-learning-rate",
        type=rate,
        metavar="R",
        help="at the end, not above the first (1e-6; perceive-tiny: 1e-4)",
    )
    scenes = integer(1, 4096)
    add("--scenes", type=scenes, metavar="N", help="scenes in a batch, three images each (16)")
    add(
        "--sides",
        type=integer(16, 1024),
        nargs="+",
        metavar="PX",
        help="of the square crops in pixels, 16 to 1024, taken in turn (224; perceive-tiny: 64 96 "
        "128 192)",
    )
    add("--restorer-steps", type=steps, metavar="N", help="of each of the two restorers (400)")
    add(
        "--pretrain-steps",
        type=steps,
        metavar="N",
        help="of perceive-tiny's towers (16000, or 12000 with --start-from)",
    )
    seed = integer(0, 2**31 - 1)
    add("--seed", type=seed, default=0, metavar="N", help="of all that is random (0)")
    every = integer(1, _LONGEST)
    add("--checkpoint-every", type=every, default=250, metavar="N", help="steps between two (250)")
    add("--device", type=device, default="auto", help="cpu, cuda, cuda:1 or auto (default)")
    add(
        "--workers",
        type=integer(0, 256),
        default=0,
        metavar="N",
        help="processes that draw the samples of perceive-tiny's towers (0: a thread); a GPU takes "
        "what a dozen draw",
    )


def run(arguments: Namespace) -> int:
    """Train, audit and save a perceiver."""
    from perceive_adapter.data.pairs import find_photos
    from perceive_adapter.data.photos import load_photos
    from perceive_adapter.data.samples import CropSampler
    from perceive_adapter.training.runs import audit_elsewhere, claim_folder, split_photos
    from perceive_adapter.training.stage1 import train_perceiver

    plan = make_plan(arguments)
    paths = find_photos(arguments.data)
    if arguments.audit_data is None:
        split = split_photos(paths, arguments.seed)
    else:
        split = audit_elsewhere(paths, find_photos(arguments.audit_data))
    perceiver = _create(arguments, plan)  # options that cannot work are found before training
    say(
        f"{len(split.trained)} photographs to train on, in two folds, and "
        f"{len(split.audit)} others for the audit."
    )
    held_out = load_photos(split.audit, largest=_LARGEST)
    photos = load_photos(split.trained, largest=_LARGEST)
    checkpoints = claim_folder(arguments.out, options_of(arguments, plan, split.digest))
    if plan.pretrain is not None:
        perceiver = _create(arguments, plan, photos, checkpoints)
    folds = [CropSampler(photos[fold::2], dark=_DARK) for fold in range(2)]
    medium = _medium(arguments, plan, folds, checkpoints)
    train_perceiver(
        perceiver.to(arguments.device),
        folds,
        recipe=plan.stage1,
        mediums=[medium],
        checkpoint=checkpoints / "stage1.pt",
        every=arguments.checkpoint_every,
    )
    _audit(arguments, perceiver.cpu(), held_out, medium, split, facts_of(arguments, plan, split))
    return 0


def _audit(
    arguments: Namespace,
    perceiver: QualityPerceiver,
    photos: Sequence[Tensor],
    medium: Medium,
    split: Split,
    facts: dict[str, float | str],
) -> None:
    """Audit a trained perceiver, print and save what was found, and save the perceiver."""
    from perceive_adapter.cli.audit_report import report
    from perceive_adapter.perceiver.audit import audit

    say(f"Audit on {len(photos)} photographs that training never saw.")
    found = audit(perceiver, photos, medium=medium, seed=arguments.seed)
    root = arguments.audit_data or arguments.data
    names = sorted(path.relative_to(root).as_posix() for path in split.audit)
    figures = report(found, facts, names, arguments.out / "audit.json")
    perceiver.save_pretrained(arguments.out, figures=figures)
    print(f"\nSaved in {str(arguments.out)!r}.")


def _create(
    arguments: Namespace,
    plan: Plan,
    photos: Sequence[Tensor] = (),
    checkpoints: Path | None = None,
) -> QualityPerceiver:
    """Make the perceiver with untrained prompts; train perceive-tiny's towers on ``photos``."""
    from perceive_adapter.data import FAMILIES
    from perceive_adapter.perceiver import QualityPerceiver
    from perceive_adapter.training.pretrain import TinyTowers, as_perceiver, pretrain

    prompts = {
        "words": arguments.words,
        "context_length": arguments.context_length,
        "seed": arguments.seed,
        "degradations": FAMILIES if arguments.heads else (),
    }
    if plan.pretrain is None:
        return QualityPerceiver.create(arguments.clip, arguments.pretrained, **prompts)
    if checkpoints is None:
        return as_perceiver(TinyTowers(arguments.seed, plan.start), **prompts)
    towers = pretrain(
        photos,
        start=plan.start,
        schedule=plan.pretrain,
        seed=arguments.seed,
        checkpoint=checkpoints / "pretrain.pt",
        every=arguments.checkpoint_every,
        device=arguments.device,
        workers=arguments.workers,
    )
    return as_perceiver(towers, **prompts)


def _medium(
    arguments: Namespace, plan: Plan, folds: Sequence[CropSampler], checkpoints: Path
) -> Medium:
    """Make what makes the medium images."""
    from perceive_adapter.data.triplets import Blend, Milder, Mixed, Restored
    from perceive_adapter.training.restorers import train_restorers

    if arguments.medium == "blend":
        return Blend()
    if arguments.medium == "milder":
        return Milder()
    restored = Restored(
        train_restorers(
            folds,
            schedule=plan.restorers,
            seed=arguments.seed,
            folder=checkpoints,
            every=arguments.checkpoint_every,
            device=arguments.device,
        )
    )
    return restored if arguments.medium == "restored" else Mixed([restored, Blend(), Milder()])
