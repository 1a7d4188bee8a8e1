"""What somebody meant who typed a command that isn't there."""

from difflib import get_close_matches

from oscloudctl.catalogue import COMMANDS

# Words of virsh, multipass, incus and docker, as fingers remember them.
FOREIGN_WORDS = {
    "attach": "vm-console",
    "autostart": "vm-set --autostart",
    "build": "template-build",
    "cancel": "job-cancel",
    "console": "vm-console",
    "event-watch": "events",
    "create": "vm-create",
    "define": "vm-create",
    "delete": "vm-delete",
    "destroy": "vm-stop --force",
    "doctor": "daemon-doctor",
    "dominfo": "vm-info",
    "domrename": "vm-rename",
    "exec": "vm-ssh",
    "find": "template-list",
    "help": "--help",
    "image-list": "template-list",
    "images": "template-list",
    "info": "vm-info",
    "jobs": "job-list",
    "kill": "vm-stop --force",
    "launch": "vm-create",
    "list": "vm-list",
    "logs": "vm-log",
    "ls": "vm-list",
    "managedsave": "vm-suspend",
    "monitor": "events",
    "net-info": "network-info",
    "net-list": "network-list",
    "networks": "network-list",
    "ps": "vm-list",
    "qemu-monitor-command": "vm-qemu-command",
    "reboot": "vm-restart",
    "reset": "vm-restart --force",
    "resume": "vm-resume",
    "rm": "vm-delete",
    "run": "vm-create",
    "shell": "vm-ssh",
    "shutdown": "vm-stop",
    "ssh": "vm-ssh",
    "start": "vm-start",
    "status": "daemon-info",
    "stop": "vm-stop",
    "suspend": "vm-suspend",
    "tasks": "job-list",
    "undefine": "vm-delete",
    "update": "vm-set",
    "vm-destroy": "vm-stop --force",
    "vm-reboot": "vm-restart",
    "vm-shell": "vm-ssh",
    "vm-shutdown": "vm-stop",
    "vol-list": "disk-list",
}


def suggest_command(word: str) -> str:
    """Give the hint for an unknown command: the nearest of ours, or where the list is."""
    meant = word.lower().replace("_", "-")
    if meant in COMMANDS:
        return f"did you mean: oscloudctl {meant}"
    if meant in FOREIGN_WORDS:
        return f"did you mean: oscloudctl {FOREIGN_WORDS[meant]}"
    known = [*COMMANDS, *FOREIGN_WORDS]
    for match in get_close_matches(meant, known, n=1, cutoff=0.6):
        return f"did you mean: oscloudctl {FOREIGN_WORDS.get(match, match)}"
    return "the list of commands: oscloudctl --help"
