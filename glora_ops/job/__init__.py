"""An aggregation in parts: by any number of processes on any machines that see the same files.

A job is a folder. `plan` looks at the clients and writes down which modules are computed together;
`work` computes some of these parts, each into a file of its own; `join` puts them together, to the
bit what `aggregate_adapters` gives, which can do all three. Who starts the workers is the user's
matter: parts that are there are not made again, so that any worker may be killed, repeated or
doubled.
"""

from .folder import read_job
from .join import join
from .launch import submit, torchrun
from .plan import plan
from .status import Status, status
from .work import Share, Worked, share, work

__all__ = [
    "Share",
    "Status",
    "Worked",
    "join",
    "plan",
    "read_job",
    "share",
    "status",
    "submit",
    "torchrun",
    "work",
]
