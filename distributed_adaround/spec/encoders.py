"""The parts `text`, `images` and `audio` of a section of data: how the tensors of a sample are made from its file."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distributed_adaround.spec.explain import ContradictionError, Section, one_rule
from distributed_adaround.spec.fields import PositiveInt, Text

_Numbers = Annotated[
    list[float],
    Field(min_length=1, max_length=3),
    one_rule("must be a list of three numbers, or of one for grey pictures"),
]
_PositiveNumbers = Annotated[
    list[Annotated[float, Field(gt=0)]],
    Field(min_length=1, max_length=3),
    one_rule("must be a list of three numbers above 0, or of one for grey pictures"),
]


class TextSpec(Section):
    """Texts in .txt, .jsonl or .parquet files, through the tokenizer of the model."""

    column: Text | None = None
    """Column of .jsonl and .parquet files: texts, or chats (lists of messages with role and content), which go through
    the chat template of the tokenizer. null: messages, else text, else the only one that holds texts."""
    packed: bool | None = None
    """true: the texts of a file are joined and cut into windows of sequence_length tokens; files that fill none are
    left out, with a warning. false: each text is a sample (in .txt files each line), padded to the longest of its
    microbatch. Blank lines and rows are left out. null: true for causal language models, unless a class is asked for,
    else false."""
    sequence_length: PositiveInt | None = None
    """Tokens of a window, and most tokens of a text that is a sample. null: 512, or what the model takes if that is
    less."""
    target_column: Text | None = None
    """For encoder-decoders, not packed: column with what the decoder is to write. null: the text itself."""
    label_column: Text | None = None
    """For evaluate.metric accuracy: column with the class of a text, its number or its name in config.json. null:
    label."""

    @model_validator(mode="after")
    def _target_of_single_texts(self) -> Self:
        if self.packed and self.target_column is not None:
            text = "is for texts that are not packed; remove it, or make packed false"
            raise ContradictionError(("target_column",), self.target_column, text)
        return self


class ImagesSpec(Section):
    """Pictures in .jpg, .jpeg, .png and .webp files, or in webdataset archives (.tar), through the image processor of
    the model, or as these fields say."""

    resize: PositiveInt | None = None
    """Pixels of the shorter side, by a bicubic filter; null: not resized."""
    crop: PositiveInt | None = None
    """Pixels of both sides of the square that is cut from the middle; null: not cut."""
    mean: _Numbers | None = Field(None, examples=[[0.485, 0.456, 0.406]])
    """Mean of red, green and blue, from 0 to 1, that is subtracted; one number: of grey, and pictures become grey."""
    std: _PositiveNumbers | None = Field(None, examples=[[0.229, 0.224, 0.225]])
    """Standard deviation of each of these, from 0 to 1, by which the rest is divided."""

    @property
    def by_hand(self) -> bool:
        """Whether these fields say what is done, instead of an image processor."""
        return bool(self.model_fields_set)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            text = f"is more than resize, {self.resize}; make it {self.resize} or less"
            raise ContradictionError(("crop",), self.crop, text)
        if (self.mean is None) != (self.std is None):
            name, other = ("mean", "std") if self.std is None else ("std", "mean")
            raise ContradictionError((name,), getattr(self, name), f"needs {other} beside it; give both or none")
        if self.mean is not None and len(self.mean) == 2:
            raise ContradictionError(("mean",), self.mean, "has two numbers; give three, or one for grey pictures")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            text = f"has {len(self.std)} channels, mean has {len(self.mean)}; give as many"
            raise ContradictionError(("std",), self.std, text)
        return self


class AudioSpec(Section):
    """Recordings in .wav and .flac files, or in webdataset archives (.tar), there also with transcripts (.txt), through
    the feature extractor of the model."""

    seconds: Annotated[float, Field(gt=0)] | None = None
    """Longest piece: longer recordings are cut into several samples of equal length. null: 30, or what the feature
    extractor takes if that is less."""
