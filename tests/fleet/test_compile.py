"""What compiles or exports by itself does so wrapped, as a whole and with the same output."""

import pytest
from compiling import CHECKS, Unsupported, check
from members import MEMBERS

# One of each kind, the small ones; the others take minutes together.
FAST = {
    "compiles": ("Compact", "DITN", "DnCNN", "DRUNet", "PLKSR", "SwiftSRGAN", "monai.SegResNet"),
    "compiles for a given perception": ("DnCNN", "PLKSR"),
    "compiles to train": ("Compact", "PLKSR"),
    "exports": ("DRUNet", "PLKSR"),
}
CASES = [
    pytest.param(name, what, marks=[] if name in FAST[what] else [pytest.mark.slow])
    for what in CHECKS
    for name in MEMBERS
]


@pytest.mark.parametrize(("name", "what"), CASES)
def test_compiled_it_is_the_same(name: str, what: str) -> None:
    member = MEMBERS[name]
    if not member.installed:
        pytest.skip(f"{member.package} is not installed")
    try:
        check(member, what)
    except Unsupported as error:
        pytest.skip(f"nor does the bare network: {error}")
