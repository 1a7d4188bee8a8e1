"""What a template does in each of its guests with cloud-init, once: files of its own, commands."""

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Hooks:
    """`files` is a gzipped tar archive, or empty; `owners` are theirs by path, as for chown(1).

    Files are there before the guest's network and sshd; whose they are is known only when its users
    have been made, right before its commands.
    """

    files: bytes = b""
    owners: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()

    def script(self) -> str:
        """Give the script of the first boot's end, which stops at what fails; "" for none."""
        owners = [shlex.join(["chown", "-h", owner, path]) for path, owner in self.owners]
        lines = [*owners, *self.commands]
        return "\n".join(["#!/bin/sh", "set -e", *lines, ""]) if lines else ""
