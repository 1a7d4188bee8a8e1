"""Every command there is, in the order of the help: where its code is and what it does, in a line.

A visible list instead of imports, because importing all commands would cost each of them the time.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a command's function is found and the line of help it has in the overview."""

    section: str
    module: str
    summary: str


_VM = "Virtual machines"
_INSIDE = "Inside a virtual machine"
_SNAPSHOT = "Snapshots"
_DISK = "Disks"
_NETWORK = "Networks"
_TEMPLATE = "Templates"
_JOB = "Jobs and events"
_DAEMON = "The daemon and this program"

COMMANDS: dict[str, Entry] = {
    "vm-create": Entry(_VM, "vm_create", "Make a vm and start it; a name alone is enough."),
    "vm-list": Entry(_VM, "vm", "List the vms."),
    "vm-info": Entry(_VM, "vm", "Show all there is to know about vms."),
    "vm-start": Entry(_VM, "vm_power", "Start vms."),
    "vm-stop": Entry(_VM, "vm_power", "Stop vms: power button first, then harder."),
    "vm-restart": Entry(_VM, "vm_power", "Stop vms and start them again."),
    "vm-pause": Entry(_VM, "vm_power", "Freeze running vms."),
    "vm-suspend": Entry(_VM, "vm_power", "Save vms with their memory to disk and end them."),
    "vm-resume": Entry(_VM, "vm_power", "Let paused or suspended vms go on."),
    "vm-delete": Entry(_VM, "vm_power", "Delete vms and their disks."),
    "vm-clone": Entry(_VM, "vm_clone", "Make a vm with another one's disk, and start it."),
    "vm-rename": Entry(_VM, "vm", "Give a vm another name."),
    "vm-set": Entry(_VM, "vm_set", "Change what vms are: size, name, networks, policies."),
    "vm-export": Entry(_VM, "export", "Write a vm into one file, for vm-import."),
    "vm-import": Entry(_VM, "vm_import", "Make a stopped vm of a file that vm-export wrote."),
    "vm-publish": Entry(_VM, "vm_publish", "Make a template of a stopped vm."),
    "vm-wait": Entry(_VM, "vm", "Wait until vms are ready, in a given state, or answer."),
    "vm-ssh": Entry(_INSIDE, "vm_inside", "Log in to a vm, or run a command in it, by ssh."),
    "vm-ssh-config": Entry(_INSIDE, "vm_inside", "Print how ssh alone finds vms: ~/.ssh/config."),
    "vm-console": Entry(_INSIDE, "vm_inside", "Attach the terminal to a vm's serial console."),
    "vm-log": Entry(_INSIDE, "vm_inside", "Show what a vm printed on its console, or qemu said."),
    "vm-qemu-command": Entry(_INSIDE, "vm_inside", "Send a QMP command to a vm's qemu."),
    "snapshot-create": Entry(_SNAPSHOT, "snapshot", "Keep a vm's disk as it is, under a name."),
    "snapshot-list": Entry(_SNAPSHOT, "snapshot", "Show a vm's snapshots as a tree."),
    "snapshot-restore": Entry(_SNAPSHOT, "snapshot", "Have a vm's disk as it was."),
    "snapshot-delete": Entry(_SNAPSHOT, "snapshot", "Forget a snapshot."),
    "disk-list": Entry(_DISK, "disk", "List the disks."),
    "disk-info": Entry(_DISK, "disk", "Show all there is to know about disks."),
    "disk-create": Entry(_DISK, "disk_changes", "Make a disk, empty or with a template's system."),
    "disk-attach": Entry(_DISK, "disk_changes", "Give a vm a disk, at once if it runs."),
    "disk-detach": Entry(_DISK, "disk_changes", "Take a disk from a vm, at once if it runs."),
    "disk-resize": Entry(_DISK, "disk_changes", "Make a disk larger, at once if its vm runs."),
    "disk-delete": Entry(_DISK, "disk_changes", "Delete disks that no vm has."),
    "disk-export": Entry(_DISK, "export", "Write a disk into one file."),
    "network-list": Entry(_NETWORK, "network", "List the networks."),
    "network-info": Entry(_NETWORK, "network", "Show all there is to know about networks."),
    "network-create": Entry(_NETWORK, "network", "Make a network for vms; a name is enough."),
    "network-delete": Entry(_NETWORK, "network", "Delete networks that no vm is in."),
    "nic-add": Entry(_NETWORK, "nic", "Give a vm a card in one more network, at once if it runs."),
    "nic-delete": Entry(_NETWORK, "nic", "Take a network card from a vm, at once if it runs."),
    "port-add": Entry(_NETWORK, "port", "Let ports of the host lead to a vm."),
    "port-list": Entry(_NETWORK, "port", "List the forwarded ports."),
    "port-delete": Entry(_NETWORK, "port", "Let ports of the host lead nowhere."),
    "template-list": Entry(_TEMPLATE, "template", "List the templates vms can be made from."),
    "template-info": Entry(_TEMPLATE, "template", "Show all there is to know about templates."),
    "template-build": Entry(_TEMPLATE, "template", "Build templates that are built here."),
    "template-warm": Entry(_TEMPLATE, "template", "Boot a template once, for fast new vms."),
    "template-download": Entry(_TEMPLATE, "template", "Download templates their vendor publishes."),
    "template-import": Entry(_TEMPLATE, "template_import", "Make a template of an image you have."),
    "template-delete": Entry(_TEMPLATE, "template", "Delete templates that no disk stands on."),
    "job-list": Entry(_JOB, "job", "List the jobs, the newest first."),
    "job-info": Entry(_JOB, "job", "Show all there is to know about jobs."),
    "job-wait": Entry(_JOB, "job", "Wait until jobs have ended; fails as they do."),
    "job-cancel": Entry(_JOB, "job", "End jobs early and undo what they did."),
    "events": Entry(_JOB, "events", "Print what happens, an event a line, until Ctrl-C."),
    "daemon-info": Entry(_DAEMON, "daemon", "Show the daemon's version, state and settings."),
    "daemon-doctor": Entry(_DAEMON, "daemon", "Check this box and say what to mend."),
    "daemon-stop-guests": Entry(_DAEMON, "daemon", "Stop all vms, as the host's shutdown does."),
    "completion": Entry(_DAEMON, "completion", "Print the completion script of a shell."),
    "version": Entry(_DAEMON, "version", "Print the version of this program."),
}
