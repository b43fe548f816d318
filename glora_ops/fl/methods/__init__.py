"""Federated methods on equal footing: each a frozen dataclass in a file of its own."""

from .base import Method
from .fedex import FedExLoRA
from .fedit import FedIT
from .fedplora import FedPLoRA
from .fedrot import FedRotLoRA
from .fedsvd import FedSVD
from .ffa import FFALoRA
from .flexlora import FlexLoRA
from .flora import FLoRA
from .glora import Glora
from .hetlora import HetLoRA
from .raflora import RaFLoRA
from .rolora import RoLoRA

__all__ = ["METHODS", "Method"]

#: Names as configurations write them.
METHODS: dict[str, type[Method]] = {
    "glora": Glora,
    "fedit": FedIT,
    "ffa": FFALoRA,
    "rolora": RoLoRA,
    "flora": FLoRA,
    "flexlora": FlexLoRA,
    "fedex": FedExLoRA,
    "hetlora": HetLoRA,
    "fedrot": FedRotLoRA,
    "raflora": RaFLoRA,
    "fedplora": FedPLoRA,
    "fedsvd": FedSVD,
}
