"""The section `data` of a job: calibration data, and how it is cut."""

from typing import Annotated

from pydantic import Field

from distributed_adaround.spec.explain import Section
from distributed_adaround.spec.fields import Arguments, ImportPath, NameIn, PositiveInt, Text, TextOrTexts

# From a record of a file to the tensors of a sample (the contract is data.encode.Encoder).
ENCODERS: dict[str, str] = {"arrays": "distributed_adaround.data.encode:ArraysEncoder"}


class DataSpec(Section):
    """Calibration data, and how it is cut."""

    uri: TextOrTexts = Field(
        description="Files with samples: path or URI of a file, a folder or a glob, or a list of these. Types: .npy, "
        ".npz, .safetensors, .pt, .pth, .parquet, .jsonl.",
        examples=["s3://calib/images-*.npz"],
    )
    checksums: Text | None = Field(
        None,
        description="Path or URI of a list of SHA-256, as sha256sum writes it, that every file must be in and agree "
        "with. null: files are only proven to stay the same while the job runs.",
        examples=["s3://calib/SHA256SUMS"],
    )
    num_samples: PositiveInt | None = Field(None, description="How many samples to use; null: all.")
    microbatch_size: PositiveInt = Field(32, description="Samples that pass through the model at once.")
    virtual_shards: PositiveInt = Field(
        64,
        description="Parts the data is cut into and dealt to the ranks; a property of the job, so that the number of "
        "ranks does not change the result. More ranks than this have nothing to do.",
    )
    fields: dict[Text, Text] | None = Field(
        None, description="{input of the model: field of the files}; null: all numeric fields, under their own names."
    )
    one_sample_per_file: bool = Field(False, description="Each file is one sample; no first dimension counts samples.")
    encoder: Annotated[str, NameIn(ENCODERS)] = Field(
        "arrays", description="What makes tensors of each sample's record, before samples are collated; arrays: as is."
    )
    encoder_args: Arguments = Field({}, description="What another encoder than arrays needs.")
    transform: ImportPath | None = Field(
        None,
        description="module:callable that makes of each microbatch (a dict of tensors) the one that the model gets.",
        examples=["my_models:normalize"],
    )
    mask_field: Text = Field(
        "attention_mask", description="Field that is nonzero where a token counts and 0 where it is padding."
    )
    pad_value: float = Field(0.0, description="Value that fills up the shorter samples of a microbatch.")
    prefetch: int = Field(2, ge=0, le=1024, description="Microbatches that are read ahead; 0: none.")
