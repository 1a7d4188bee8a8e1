"""How fast guests may send and receive: the nft table `netdev oscloud_rates`, replaced whole.

What is beyond a tap's rate is dropped, as by a switch whose queue is full. tc(8) could delay what
goes to the guest; what comes from it takes kernel modules for that which not every host has.
"""

from collections.abc import Mapping

from oscloudd.host.commands import run
from oscloudd.host.network.interfaces import check_interface_name

TABLE = "netdev oscloud_rates"

# A guest's card hands over up to 64 KiB at once, and TCP keeps near a rate only where several such
# fit; a tenth of a second is what switches hold.
_LEAST_BURST_BYTES = 256 << 10
_BURST_PER_SECOND = 10
# Deleting a table that isn't there fails, adding one that is doesn't: so add, then delete.
_REMOVAL = f"add table {TABLE}\ndelete table {TABLE}\n"


async def apply_rates(rates: Mapping[str, int]) -> None:
    """Limit each of these taps, which are there, to its bits a second; no others."""
    await run(["nft", "-f", "-"], input_text=build_rates(rates))


def build_rates(rates: Mapping[str, int]) -> str:
    """Give the text for `nft -f` that replaces our table by the one for these taps."""
    if not rates:
        return _REMOVAL
    chains = "".join(
        _chain(tap, hook, bits // 8)
        for tap, bits in sorted(rates.items())
        for hook in ("ingress", "egress")
    )
    return f"{_REMOVAL}table {TABLE} {{\n{chains}}}\n"


def _chain(tap: str, hook: str, bytes_per_second: int) -> str:
    check_interface_name(tap)
    burst = max(_LEAST_BURST_BYTES, bytes_per_second // _BURST_PER_SECOND)
    return (
        f"\tchain {tap}_{hook} {{\n"
        f'\t\ttype filter hook {hook} device "{tap}" priority filter; policy accept;\n'
        f"\t\tlimit rate over {bytes_per_second} bytes/second burst {burst} bytes drop\n"
        "\t}\n"
    )
