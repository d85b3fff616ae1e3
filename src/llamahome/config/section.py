"""What all sections of the settings share: values that were read are frozen, and unknown keys and non-finite numbers are refused."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen group of settings; an unknown key is refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        alias_generator=lambda name: name.rstrip("_"),  # `async` is a keyword of Python
        serialize_by_alias=True,
    )
