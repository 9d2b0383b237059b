"""Images of the components, read from `components/digests.yaml`."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from skd_lib._core.documents import parse_yaml

DIGESTS = Path(__file__).with_name("digests.yaml")


class Image(BaseModel):
    """One published image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = Field(description="Registry and name, without tag.")
    version: str = Field(description="Tag it is published under.")
    digest: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$", description="Empty until the image is published.")

    @property
    def reference(self) -> str:
        """Reference that a pod pulls: pinned by digest once there is one, by version until then."""
        return f"{self.image}@{self.digest}" if self.digest else f"{self.image}:{self.version}"


def parse_images(text: str, *, where: str = "digests.yaml") -> dict[str, Image]:
    """Return all images by name, from the text of such a file."""
    return TypeAdapter(dict[str, Image]).validate_python(parse_yaml(text, where=where))


def read_images(path: Path = DIGESTS) -> dict[str, Image]:
    """Return all images by name."""
    return parse_images(path.read_text(encoding="utf-8"))


TRAIN = read_images()["train"].reference
VLLM = read_images()["vllm"].reference
COMET = read_images()["comet"].reference
