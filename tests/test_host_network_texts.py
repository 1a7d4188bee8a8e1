"""What is said to `ip` and `nft` and read from them: pure functions."""

import tempfile
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest

from oscloudd.errors import InvalidArgumentError
from oscloudd.host.network.bridges import Bridge, build_changes, build_creation
from oscloudd.host.network.firewall import parse_ruleset_bridges
from oscloudd.host.network.host_names import build_commands, can_find_guests
from oscloudd.host.network.interfaces import check_interface_name
from oscloudd.host.network.links import Links, Tap, parse_links
from oscloudd.host.network.name_server import (
    NameServer,
    build_name_server,
    build_names_service,
    find_barrier,
)
from oscloudd.host.network.port_rules import Forward, build_forwards
from oscloudd.host.network.resolvers import host_resolvers
from oscloudd.host.network.routes import Route, find_overlap, parse_routes
from oscloudd.host.network.ruleset import GuestNetwork, GuestPort, build_ruleset

BRIDGE = Bridge("oscloud0", IPv4Address("192.168.0.1"), 16)

GOLDEN = Path(__file__).parent / "golden" / "firewall.nft"
NETWORKS = [
    GuestNetwork("oscbr0", IPv4Network("192.168.0.0/16"), subnet6=IPv6Network("fd00:a::/64")),
    GuestNetwork(
        "oscbr1", IPv4Network("172.16.0.0/16"), nat=False, subnet6=IPv6Network("fd00:b::/64")
    ),
    GuestNetwork("oscbr2", IPv4Network("10.1.0.0/29"), isolated=True),
]
PORTS = [
    GuestPort("osctap0", "52:54:00:00:00:01", IPv4Address("192.168.0.2"), IPv6Address("fd00:a::2")),
    GuestPort("osctap1", "52:54:00:00:00:02", IPv4Address("10.1.0.2")),
]


def test_ruleset_is_the_golden_one_whatever_the_order() -> None:
    assert build_ruleset(NETWORKS, PORTS) == GOLDEN.read_text()
    assert build_ruleset(NETWORKS[::-1], PORTS[::-1]) == GOLDEN.read_text()


def test_ruleset_without_anybody_has_empty_sets() -> None:
    assert "elements" not in build_ruleset([], [])


FORWARDS = """\
add table ip oscloud_ports
delete table ip oscloud_ports
table ip oscloud_ports {
	map at_one_address {
		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
		elements = {
			127.0.0.1 . tcp . 8080 : 192.168.0.2 . 80,
			127.0.0.1 . tcp . 8081 : 192.168.0.3 . 80
		}
	}
	map everywhere {
		type inet_proto . inet_service : ipv4_addr . inet_service
		elements = {
			udp . 5353 : 192.168.0.2 . 53
		}
	}
	set bridges {
		type ifname
		elements = {
			"oscloud0"
		}
	}
	set guests {
		type ifname . ipv4_addr; flags interval
		elements = {
			"oscloud0" . 192.168.0.0/16
		}
	}
	chain filter_prerouting {
		type filter hook prerouting priority raw; policy accept;
		iifname != "lo" ip daddr 127.0.0.0/8 drop
	}
	chain nat_prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		dnat ip to ip daddr . meta l4proto . th dport map @at_one_address
		fib daddr type local dnat ip to meta l4proto . th dport map @everywhere
	}
	chain nat_output {
		type nat hook output priority -100; policy accept;
		dnat ip to ip daddr . meta l4proto . th dport map @at_one_address
		fib daddr type local dnat ip to meta l4proto . th dport map @everywhere
	}
	chain nat_postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ct status dnat oifname @bridges ip saddr 127.0.0.0/8 masquerade
		ct status dnat oifname . ip saddr @guests masquerade
	}
}
"""


def forward(text: str, guest: str, guest_port: int) -> Forward:
    protocol, address, port = text.split()
    return Forward(
        protocol, IPv4Address(address), int(port), IPv4Address(guest), guest_port,
        "oscloud0", IPv4Network("192.168.0.0/16"),
    )  # fmt: skip


def test_rules_of_forwarded_ports() -> None:
    forwards = [
        forward("udp 0.0.0.0 5353", "192.168.0.2", 53),
        forward("tcp 127.0.0.1 8081", "192.168.0.3", 80),
        forward("tcp 127.0.0.1 8080", "192.168.0.2", 80),
    ]
    assert build_forwards(forwards) == FORWARDS
    assert build_forwards([]) == "add table ip oscloud_ports\ndelete table ip oscloud_ports\n"


def test_a_name_server_is_confined_by_systemd() -> None:
    server = NameServer(
        "oscbr0", IPv4Interface("192.168.0.1/16"), Path("/run/oscloud/names/oscbr0")
    )
    argv = build_name_server(server, "dnsmasq")
    assert argv == [
        "dnsmasq", "--conf-file=/dev/null", "--user=dnsmasq",
        "--pid-file=/run/oscloud/names/oscbr0/pid", "--interface=oscbr0", "--except-interface=lo",
        "--bind-dynamic", "--no-hosts", "--hostsdir=/run/oscloud/names/oscbr0/hosts",
        "--local=/oscloud/", "--domain-needed", "--domain=oscloud",
        "--dhcp-range=192.168.0.0,static,255.255.0.0,infinite",
        "--dhcp-hostsfile=/run/oscloud/names/oscbr0/addresses",
        "--dhcp-authoritative",
        "--dhcp-ignore-clid", "--leasefile-ro", "--no-ping", "--dhcp-broadcast",
    ]  # fmt: skip
    service = build_names_service(argv, server)
    assert service[:4] == ["systemd-run", "--quiet", "--collect", f"--unit={server.unit}"]
    assert service[service.index("--") + 1 :] == argv
    assert "--property=TemporaryFileSystem=/run/oscloud:mode=0755" in service
    assert "--property=BindPaths=/run/oscloud/names/oscbr0" in service
    assert {"--property=MemoryMax=64M", "--property=TasksMax=32"} <= set(service)


def test_whom_a_name_server_asks() -> None:
    def asks(*, isolated: bool, upstream: tuple[str, ...]) -> list[str]:
        gateway = IPv4Interface("192.168.0.1/16")
        server = NameServer("oscbr0", gateway, Path("/run/names/oscbr0"), isolated, upstream)
        argv = build_name_server(server, "dnsmasq")
        return [option for option in argv if option.startswith(("--no-resolv", "--server"))]

    chosen = ["--no-resolv", "--server=9.9.9.9", "--server=10.0.0.5"]
    assert asks(isolated=False, upstream=()) == []  # the host's resolv.conf
    assert asks(isolated=True, upstream=()) == ["--no-resolv"]
    assert asks(isolated=False, upstream=("9.9.9.9", "10.0.0.5")) == chosen
    assert asks(isolated=True, upstream=("9.9.9.9", "10.0.0.5")) == chosen


def test_the_host_is_told_of_a_name_server_after_what_it_is_for() -> None:
    assert build_commands("oscbr0", IPv4Address("192.168.0.1")) == [
        ["resolvectl", "default-route", "oscbr0", "no"],
        ["resolvectl", "domain", "oscbr0", "~oscloud"],
        ["resolvectl", "dns", "oscbr0", "192.168.0.1"],
    ]
    assert not can_find_guests()  # these tests are no service of systemd's


def test_what_keeps_a_name_server_from_its_names_is_found() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        root = Path(top)
        server = NameServer("oscbr0", IPv4Interface("192.168.0.1/16"), root / "run/names/oscbr0")
        server.hosts.mkdir(parents=True)
        assert find_barrier(server) == root
        root.chmod(0o755)
        assert find_barrier(server) is None
        (root / "run").chmod(0o750)
        assert find_barrier(server) == root / "run"


@pytest.mark.parametrize(
    "name", ["", "a" * 16, "a b", 'a"', "a/b", "..", "a\n", "é", "a:b", "a%d", "{a}"]
)
def test_names_the_kernel_or_nft_would_not_take(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        check_interface_name(name)
    with pytest.raises(InvalidArgumentError):
        build_ruleset([GuestNetwork(name, IPv4Network("10.0.0.0/16"))], [])


def test_names_that_no_rule_speaks_of() -> None:
    with pytest.raises(InvalidArgumentError, match="br0 is not called oscbr"):
        build_ruleset([GuestNetwork("br0", IPv4Network("10.0.0.0/16"))], [])
    with pytest.raises(InvalidArgumentError, match="tap0 is not called osctap"):
        build_ruleset([], [GuestPort("tap0", "52:54:00:00:00:01", IPv4Address("10.0.0.2"))])


def test_guest_has_the_address_it_makes_of_its_mac() -> None:
    assert str(PORTS[1].link_local) == "fe80::5054:ff:fe00:2"


def test_bridge_has_its_own_hardware_address() -> None:
    assert build_creation(BRIDGE) == [
        "link add name oscloud0 address 02:05:c0:a8:00:01 type bridge stp_state 0 forward_delay 0"
        " mcast_snooping 0",
        "link set dev oscloud0 alias oscloud",
        "address add 192.168.0.1/16 dev oscloud0",
        "link set dev oscloud0 up",
    ]


def test_bridge_as_it_should_be_is_left_alone() -> None:
    present = {
        "flags": ["BROADCAST", "UP"],
        "address": BRIDGE.mac,
        "addr_info": [
            {"family": "inet", "local": "192.168.0.1", "prefixlen": 16},
            {"family": "inet6", "local": "fe80::1", "prefixlen": 64},
        ],
    }
    assert build_changes(BRIDGE, present) == []


def test_bridge_is_brought_to_what_it_should_be() -> None:
    present = {"addr_info": [{"family": "inet", "local": "10.0.0.1", "prefixlen": 8}]}
    assert build_changes(BRIDGE, present) == [
        "address delete 10.0.0.1/8 dev oscloud0",
        "address add 192.168.0.1/16 dev oscloud0",
        "link set dev oscloud0 address 02:05:c0:a8:00:01",
        "link set dev oscloud0 up",
    ]


def test_routes_are_read_without_the_default() -> None:
    listed = [
        {"dst": "default", "gateway": "10.0.0.1", "dev": "eth0"},
        {"dst": "192.168.7.0/24", "dev": "eth0"},
        {"type": "local", "dst": "10.0.0.5", "dev": "eth0"},
        {"type": "blackhole", "dst": "172.20.0.0/14"},
    ]
    assert parse_routes(listed) == [
        Route(IPv4Network("192.168.7.0/24"), "eth0"),
        Route(IPv4Network("10.0.0.5/32"), "eth0"),
        Route(IPv4Network("172.20.0.0/14"), ""),
    ]


@pytest.mark.parametrize(
    ("route", "overlaps"),
    [
        ("192.168.7.0/24", True),
        ("192.168.0.5/32", True),
        ("192.0.0.0/8", True),
        ("172.16.0.0/12", False),
        ("128.0.0.0/1", False),
        ("0.0.0.0/0", False),
    ],
)
def test_overlap(route: str, overlaps: bool) -> None:
    routes = [Route(IPv4Network(route), "eth0")]
    assert (find_overlap(IPv4Network("192.168.0.0/16"), routes) is not None) == overlaps


def test_resolvers_behind_systemd_resolved(tmp_path: Path) -> None:
    (tmp_path / "stub").write_text("# x\nnameserver 127.0.0.53\noptions edns0\n")
    (tmp_path / "real").write_text(
        "nameserver 10.0.0.53\nnameserver fe80::1%eth0\nnameserver 9.9.9.9\n"
    )
    found = host_resolvers(tmp_path / "stub", tmp_path / "real")
    assert found == (IPv4Address("10.0.0.53"), IPv4Address("9.9.9.9"))


def test_resolvers_of_a_plain_host_are_not_mixed_with_others(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("nameserver 10.1.1.1\nnameserver 10.1.1.1\nnameserver\n")
    (tmp_path / "real").write_text("nameserver 9.9.9.9\n")
    found = host_resolvers(tmp_path / "plain", tmp_path / "real")
    assert found == (IPv4Address("10.1.1.1"),)


def test_no_resolver_a_guest_could_reach(tmp_path: Path) -> None:
    (tmp_path / "local").write_text("nameserver 127.0.0.1\n")
    assert host_resolvers(tmp_path / "local", tmp_path / "none") == ()
    assert host_resolvers(tmp_path / "none", tmp_path / "none") == ()


def test_bridges_a_ruleset_speaks_of() -> None:
    packets = build_ruleset(NETWORKS, PORTS).partition("table inet oscloud {")[2]
    assert parse_ruleset_bridges(packets) == {"oscbr0", "oscbr1", "oscbr2"}
    assert parse_ruleset_bridges(build_ruleset([], [])) == set()


def test_links_of_ours_are_told_by_alias_and_kind() -> None:
    bridge = {"linkinfo": {"info_kind": "bridge"}}
    tap = {"linkinfo": {"info_kind": "tun", "info_data": {"type": "tap", "persist": False}}}
    tun = {"linkinfo": {"info_kind": "tun", "info_data": {"type": "tun", "persist": True}}}
    kept = {"linkinfo": {"info_kind": "tun", "info_data": {"type": "tap", "persist": True}}}
    listed = [
        {"ifname": "lo"},
        {"ifname": "oscbr0", "ifalias": "oscloud", **bridge},
        {"ifname": "oscbr1", **bridge},
        {"ifname": "veth0", "ifalias": "oscloud", "linkinfo": {"info_kind": "veth"}},
        {"ifname": "osctap0", **tap},
        {"ifname": "osctap1", **kept},
        {"ifname": "osctap2", **tun},
    ]
    assert parse_links(listed) == Links(("oscbr0",), (Tap("osctap0", False), Tap("osctap1", True)))
