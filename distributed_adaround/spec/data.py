"""The section `data` of a job: calibration data, and how it is cut."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distributed_adaround.spec.encoders import AudioSpec, ImagesSpec, TextSpec
from distributed_adaround.spec.explain import ContradictionError, Section
from distributed_adaround.spec.fields import Arguments, ImportPath, NameIn, PositiveInt, Text, TextOrTexts

# From a file to the tensors of its samples (the contract is data.encoder.Encoder).
ENCODERS: dict[str, str] = {
    "arrays": "distributed_adaround.data.encoder:ArrayEncoder",
    "text": "distributed_adaround.data.text:TextEncoder",
    "images": "distributed_adaround.data.images:ImageEncoder",
    "audio": "distributed_adaround.data.audio:AudioEncoder",
}
# Fields that each name an encoder, and hold what it needs.
_ENCODER_FIELDS = ("text", "images", "audio")
# Which of them reads files that no array is in.
SECTION_OF = {
    ".txt": "text",
    ".tar": "images",
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), "images"),
    **dict.fromkeys((".wav", ".flac"), "audio"),
}


class DataSpec(Section):
    """Calibration data, and how it is cut."""

    uri: TextOrTexts = Field(examples=["s3://calib/images-*.npz"])
    """Files with samples: path or URI of a file, a folder or a glob, or a list of these. Types: .npy, .npz,
    .safetensors, .pt, .pth, .parquet, .jsonl; with text, images or audio theirs."""
    text: TextSpec | None = None
    """The files hold texts. {}: with the defaults."""
    images: ImagesSpec | None = None
    """The files are pictures. {}: with the image processor of the model."""
    audio: AudioSpec | None = None
    """The files are recordings. {}: with the defaults."""
    processor: Text | None = None
    """Path or URI of the directory with the tokenizer, image processor or feature extractor; null: that of model.hf."""
    checksums: Text | None = Field(None, examples=["s3://calib/SHA256SUMS"])
    """Path or URI of a list of SHA-256, as sha256sum writes it, that every file must be in and agree with. null: files
    are only proven to stay the same while the job runs."""
    num_samples: PositiveInt | None = None
    """How many samples to use, evenly spaced; files that hold fewer are refused. null: all."""
    max_samples: PositiveInt | None = None
    """How many samples to use at most, evenly spaced; null: all."""
    microbatch_size: PositiveInt = 32
    """Samples that pass through the model at once."""
    virtual_shards: PositiveInt = 64
    """Parts the data is cut into and dealt to the ranks; a property of the job, so that the number of ranks does not
    change the result. More ranks than this have nothing to do."""
    fields: dict[Text, Text] | None = None
    """{input of the model: field of the files}; null: all numeric fields, under their own names."""
    one_sample_per_file: bool = False
    """Each file is one sample; no first dimension counts samples."""
    encoder: Annotated[str, NameIn(ENCODERS)] | None = None
    """What makes the tensors of each sample, before samples are collated; null: text, images or audio where that is
    given, else arrays, as they are."""
    encoder_args: Arguments = Field({})
    """What another encoder than these needs."""
    transform: ImportPath | None = Field(None, examples=["my_models:normalize"])
    """module:callable that makes of each microbatch (a dict of tensors) the one that the model gets."""
    mask_field: Text = "attention_mask"
    """Field that is nonzero where a token counts and 0 where it is padding."""
    pad_value: float = 0.0
    """Value that fills up the shorter samples of a microbatch; texts get the padding token of their tokenizer."""
    prefetch: int = Field(2, ge=0, le=1024)
    """Microbatches that are read ahead; 0: none."""

    @property
    def encoder_name(self) -> str:
        """The encoder that reads the files."""
        named = self.encoder or next((name for name in _ENCODER_FIELDS if getattr(self, name) is not None), None)
        return named or "arrays"

    @model_validator(mode="after")
    def _one_encoder(self) -> Self:
        if self.num_samples is not None and self.max_samples is not None:
            text = "and num_samples exclude each other; remove one of them"
            raise ContradictionError(("max_samples",), self.max_samples, text)
        given = [name for name in _ENCODER_FIELDS if getattr(self, name) is not None]
        if len(given) > 1:
            text = f"and {given[0]} exclude each other; remove one of them"
            raise ContradictionError((given[1],), getattr(self, given[1]), text)
        if given and self.encoder not in (None, given[0]):
            raise ContradictionError(("encoder",), self.encoder, f"contradicts {given[0]}; remove one of them")
        for name in ("fields", "one_sample_per_file") if self.encoder_name in _ENCODER_FIELDS else ():
            value = getattr(self, name)
            if value:
                text = f"is for files of arrays, not with {self.encoder_name}; remove it"
                raise ContradictionError((name,), value, text)
        return self
