"""Which image each component runs, read from `images/digests.yaml`."""

from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from skd_lib.documents import parse_yaml

# A source tree keeps the file beside the Dockerfiles; a wheel carries a copy in this package.
SOURCE_TREE = Path(__file__).resolve().parent.parent
IN_SOURCE_TREE = SOURCE_TREE / "images" / "digests.yaml"


class Image(BaseModel):
    """One published image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = Field(description="Registry and name, without tag.")
    version: str = Field(description="Tag it is published under.")
    digest: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$", description="Empty until the image is published.")

    @property
    def reference(self) -> str:
        """What a pod pulls: pinned by digest once there is one, by version until then."""
        return f"{self.image}@{self.digest}" if self.digest else f"{self.image}:{self.version}"


def parse_images(text: str, *, where: str = "digests.yaml") -> dict[str, Image]:
    """All images by name, from the text of such a file."""
    return TypeAdapter(dict[str, Image]).validate_python(parse_yaml(text, where=where))


def read_images(path: Path = IN_SOURCE_TREE) -> dict[str, Image]:
    """All images by name; those of the wheel where there is no source tree."""
    source = path if path.is_file() else files("components").joinpath("digests.yaml")
    return parse_images(source.read_text(encoding="utf-8"))


TRAIN = read_images()["train"].reference
COMET = read_images()["comet"].reference
