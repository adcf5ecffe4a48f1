"""Any restoration network works as it is: every architecture that can be had, end to end."""

import dataclasses
import functools
from pathlib import Path

import pytest
import spandrel
import spandrel_extra_arches
from checks import CHECKS, Outcome, run_checks
from members import LARGE, LEFT_OUT, MEMBERS

from perceive_adapter import BackboneError, plan_sites, wrap

REGISTRIES = {
    "spandrel": spandrel.MAIN_REGISTRY,
    "spandrel_extra_arches": spandrel_extra_arches.EXTRA_REGISTRY,
}
FLEET = [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in MEMBERS]


@functools.cache
def outcome(name: str) -> Outcome:
    if not MEMBERS[name].installed:
        pytest.skip(f"{MEMBERS[name].package} is not installed")
    return run_checks(MEMBERS[name])


def architectures(package: str) -> set[str]:
    return {str(support.architecture.id) for support in REGISTRIES[package].architectures()}


def built(package: str) -> set[str]:
    return {member.architecture for member in MEMBERS.values() if member.package == package}


@pytest.mark.parametrize("package", REGISTRIES)
def test_every_architecture_is_built_or_left_out_for_a_reason(package: str) -> None:
    assert built(package) <= architectures(package)
    assert architectures(package) - built(package) <= set(LEFT_OUT)


def test_what_is_left_out_exists() -> None:
    missing = {name for package in REGISTRIES for name in architectures(package) - built(package)}
    assert set(LEFT_OUT) == missing


@pytest.mark.parametrize("name", FLEET)
def test_sites_are_found_without_configuration(name: str) -> None:
    found = outcome(name)
    assert found.failures.get("wraps") is None, found.failures["wraps"]
    plan = found.plan
    assert plan is not None
    assert plan.of("level")
    assert plan.of("layer")
    assert plan.parameters <= max(120_000, 0.03 * plan.backbone_parameters)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", FLEET)
def test_it_goes_all_the_way(name: str, check: str) -> None:
    failures = outcome(name).failures
    assert check not in failures, failures[check]


def test_the_table_has_every_network() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text().splitlines()
    assert [name for name in MEMBERS if not any(x.startswith(f"| {name} |") for x in lines)] == []


@pytest.mark.parametrize("name", ["IPT", "deepinv.DRUNet"])
def test_a_network_that_asks_for_more_says_what_to_give(name: str) -> None:
    member = MEMBERS[name]
    if not member.installed:
        pytest.skip(f"{member.package} is not installed")
    with pytest.raises(BackboneError, match=r"give wrap\(\) one that works, example=\.\.\."):
        wrap(member.net(), perceiver=False)


@pytest.mark.parametrize("name", ["CRAFT", "NAFNet", "OmniSR", "SPAN", "SwinIR"])
def test_sites_depend_on_neither_the_weights_nor_the_size(name: str) -> None:
    member = MEMBERS[name]

    def chosen(seed: int, size: int) -> list[object]:
        plan = plan_sites(member.net(seed), example=member.images(1, size))
        # A grid that ends at the border has no exact stride.
        return [dataclasses.replace(site, stride=None) for site in plan]

    assert chosen(0, 64) == chosen(1, 64) == chosen(0, 96)
