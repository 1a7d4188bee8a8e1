"""The tables. Column names are the original's where they still mean the same.

What is allocated (names, addresses, MACs, taps, serial ports) is UNIQUE here, so that two
callers can never be given the same thing whatever the code above does.
"""

from typing import Any

from peewee import (
    SQL,
    AutoField,
    BigIntegerField,
    BooleanField,
    CharField,
    DatabaseProxy,
    DoubleField,
    ForeignKeyField,
    IntegerField,
    Model,
    NodeList,
    SqliteDatabase,
    TextField,
)

database_proxy = DatabaseProxy()


class IdField(AutoField):
    """A number never given twice, as MariaDB does by itself.

    Directories and logs are named by id, and SQLite without AUTOINCREMENT would give a new vm
    the id of the last one deleted.
    """

    def ddl(self, ctx: Any) -> Any:
        """Give the column's definition."""
        column = super().ddl(ctx)
        if isinstance(database_proxy.obj, SqliteDatabase):
            return NodeList((column, SQL("AUTOINCREMENT")))
        return column


class LongTextField(TextField):
    """Text of any length: MariaDB's TEXT ends at 64 KiB, and a user's text need not."""

    field_type = "LONGTEXT"


class Table(Model):
    """Base of all tables; bound to a database by `store.database`."""

    class Meta:
        """peewee's own."""

        database = database_proxy
        legacy_table_names = False


class Network(Table):
    """One bridge with one subnet behind it."""

    id = IdField()
    name = CharField(max_length=63, unique=True)
    ip = CharField(max_length=15)  # the network's address, dotted
    mask = IntegerField()  # prefix length
    bridge_interface_idx = IntegerField(unique=True)
    dns = LongTextField(default="")  # whom its name server asks, space separated; "": as the host
    isolated = BooleanField(default=False)  # its guests reach nothing behind the host
    nat = BooleanField(default=True)  # without, they go out under their own addresses
    subnet6 = CharField(max_length=43, null=True, unique=True)  # its IPv6 /64; null is none
    created_at = DoubleField()


class Disk(Table):
    """One qcow2: empty at first, or an overlay on a template's base image.

    The root disk of a vm is in the vm's row; a data disk has its vm and its slot in its own.
    """

    id = IdField()
    name = CharField(max_length=63, unique=True)
    size = BigIntegerField()
    template_name = CharField(max_length=63, null=True)
    warm_image = CharField(max_length=32, null=True)  # the one whose frozen disk is below it
    vm_id = IntegerField(null=True)  # the vm whose data disk it is
    slot = IntegerField(null=True)  # in which of its ports it is plugged
    is_kept = BooleanField(default=False)  # it stays when its vm goes, as all data disks do
    has_identity = BooleanField(default=False)  # a vm that is deleted has booted from it
    layer_id = IntegerField(null=True)  # what the overlay stands on; null: template, warm image
    created_at = DoubleField()

    class Meta:
        """A port takes one disk."""

        indexes = ((("vm_id", "slot"), True),)


class Layer(Table):
    """What was a disk's overlay until it was frozen: nothing is written to it any more."""

    id = IdField()
    parent = ForeignKeyField("self", null=True, on_delete="RESTRICT")  # null: template, warm image
    size = BigIntegerField()  # of the disk, when it was frozen
    whole = BooleanField(default=False)  # until then it is being frozen, and may become undone
    created_at = DoubleField()


class Vm(Table):
    """One virtual machine: what the user wants of it and what was last seen."""

    id = IdField()
    name = CharField(max_length=63, unique=True)
    uuid = CharField(max_length=36, unique=True)
    disk = ForeignKeyField(Disk, backref="vms", unique=True, on_delete="RESTRICT")
    network = ForeignKeyField(Network, backref="vms", on_delete="RESTRICT")
    mem_size = BigIntegerField()
    cpus = IntegerField()
    ip = CharField(max_length=15)
    dual_stack = BooleanField(default=False)  # its guest is told an IPv6 address, too
    mac = CharField(max_length=17, unique=True)
    tap_interface_idx = IntegerField(unique=True)
    qemu_serial_port = IntegerField(unique=True)
    state = CharField(max_length=16)
    wanted_state = CharField(max_length=16)
    reason = LongTextField(default="")
    ready = BooleanField(default=False)
    started = CharField(max_length=4, default="cold")
    started_at = DoubleField(null=True)
    accelerator = CharField(max_length=8, default="")
    # A process is named by all three: a pid alone may be somebody else's by now.
    qemu_pid = IntegerField(null=True)
    qemu_start_ticks = BigIntegerField(null=True)
    qemu_boot_id = CharField(max_length=36, null=True)
    host_keys = LongTextField(default="")  # public ssh host keys, one a line
    identified = BooleanField(default=False)  # the guest has taken its identity in
    seed_document = LongTextField(default="")  # what it is to be told at first boot
    owner_uid = BigIntegerField()  # up to 2^32 - 2, more than MariaDB's INTEGER holds
    autostart = CharField(max_length=10, default="no")
    restart = CharField(max_length=10, default="no")
    bandwidth = BigIntegerField(default=0)  # bits a second, each way; 0 is no limit
    protect = BooleanField(default=False)  # it can't be deleted
    timings = LongTextField(default="{}")  # seconds of each stage of its creation, JSON
    created_at = DoubleField()

    class Meta:
        """An address is one vm's within its network."""

        indexes = ((("network", "ip"), True),)


class Nic(Table):
    """A network card that a vm has beside its first one, which is in the vm's own row."""

    id = IdField()
    vm = ForeignKeyField(Vm, backref="nics", on_delete="RESTRICT")
    network = ForeignKeyField(Network, on_delete="RESTRICT")
    ip = CharField(max_length=15)
    mac = CharField(max_length=17, unique=True)
    tap_interface_idx = IntegerField(unique=True)
    slot = IntegerField()  # in which of the vm's ports it is plugged
    created_at = DoubleField()

    class Meta:
        """Across this table and the vms' only `cloud.taken` can tell what is free."""

        indexes = (
            (("network", "ip"), True),
            (("vm", "slot"), True),
            (("vm", "network"), True),
        )


class Snapshot(Table):
    """A layer that a user has named, to come back to."""

    id = IdField()
    vm = ForeignKeyField(Vm, on_delete="RESTRICT")
    layer = ForeignKeyField(Layer, unique=True, on_delete="RESTRICT")
    name = CharField(max_length=63)
    description = LongTextField(default="")
    kind = CharField(max_length=6)  # disk, or memory: with what the guest had in it
    created_at = DoubleField()

    class Meta:
        """A name is one snapshot's of its vm."""

        indexes = ((("vm", "name"), True),)


class Port(Table):
    """One port of the host that leads to one of a vm's."""

    id = IdField()
    vm = ForeignKeyField(Vm, backref="ports", on_delete="RESTRICT")
    spec = CharField(max_length=40)  # all of it, as users are shown it
    protocol = CharField(max_length=3)
    host_address = CharField(max_length=15)
    host_port = IntegerField()
    guest_port = IntegerField()
    created_at = DoubleField()

    class Meta:
        """A port of one address is one vm's; that 0.0.0.0 has all addresses, no index can tell."""

        indexes = ((("protocol", "host_port", "host_address"), True),)


class Job(Table):
    """One long operation: written before anything outside the database happens."""

    id = IdField()
    kind = CharField(max_length=32)
    target = CharField(max_length=63)  # the name of what it works on
    vm_id = IntegerField(null=True, index=True)
    state = CharField(max_length=10, index=True)
    step = IntegerField(default=0)  # how many of its steps are done
    stage = CharField(max_length=32, default="")  # the step under way, or the one it ended in
    params = LongTextField(default="{}")  # what its steps need to be taken up again, JSON
    attempts = IntegerField(default=1)  # daemons that have worked on it
    message = LongTextField(default="")
    error_kind = CharField(max_length=32, default="")
    owner_uid = BigIntegerField()  # up to 2^32 - 2, more than MariaDB's INTEGER holds
    created_at = DoubleField()
    finished_at = DoubleField(null=True)


class Event(Table):
    """One thing that happened; its id is its place in the sequence."""

    id = IdField()
    at = DoubleField()
    kind = CharField(max_length=16)
    vm_id = IntegerField(null=True)
    job_id = IntegerField(null=True)
    name = CharField(max_length=63)  # of the vm, or whatever else it happened to
    data = LongTextField(default="{}")  # JSON


class Meta(Table):
    """What the program remembers about itself, such as the boot it last ran in."""

    name = CharField(max_length=32, primary_key=True)
    value = LongTextField()


TABLES = (Network, Disk, Vm, Job)
LATER_TABLES = (Event, Meta)
SNAPSHOT_TABLES = (Layer, Snapshot)
PORT_TABLES = (Port,)
NIC_TABLES = (Nic,)
