"""One request's surroundings: who calls, where progress goes, what follows the answer."""

from dataclasses import dataclass

from oscloudd.cloud.jobs import OnProgress
from oscloudd.host.processes import PeerCredentials
from oscloudd.machine.console import Attachment


@dataclass
class Caller:
    """Who is calling, as the kernel recorded it, and how to reach them before the answer.

    `attachment` is set by `vm_console`: once answered, the connection carries that serial line.
    """

    credentials: PeerCredentials
    on_progress: OnProgress
    attachment: Attachment | None = None
