"""The section `data` of a job: calibration data, and how it is cut."""

from typing import Annotated

from pydantic import Field

from distributed_adaround.spec.explain import Section
from distributed_adaround.spec.fields import Arguments, ImportPath, NameIn, PositiveInt, Text, TextOrTexts

# From a record of a file to the tensors of a sample (the contract is data.loader.Encoder).
ENCODERS: dict[str, str] = {"arrays": "distributed_adaround.data.loader:Encoder"}


class DataSpec(Section):
    """Calibration data, and how it is cut."""

    uri: TextOrTexts = Field(examples=["s3://calib/images-*.npz"])
    """Files with samples: path or URI of a file, a folder or a glob, or a list of these. Types: .npy, .npz,
    .safetensors, .pt, .pth, .parquet, .jsonl."""
    checksums: Text | None = Field(None, examples=["s3://calib/SHA256SUMS"])
    """Path or URI of a list of SHA-256, as sha256sum writes it, that every file must be in and agree with. null: files
    are only proven to stay the same while the job runs."""
    num_samples: PositiveInt | None = None
    """How many samples to use; null: all."""
    microbatch_size: PositiveInt = 32
    """Samples that pass through the model at once."""
    virtual_shards: PositiveInt = 64
    """Parts the data is cut into and dealt to the ranks; a property of the job, so that the number of ranks does not
    change the result. More ranks than this have nothing to do."""
    fields: dict[Text, Text] | None = None
    """{input of the model: field of the files}; null: all numeric fields, under their own names."""
    one_sample_per_file: bool = False
    """Each file is one sample; no first dimension counts samples."""
    encoder: Annotated[str, NameIn(ENCODERS)] = "arrays"
    """What makes tensors of each sample's record, before samples are collated; arrays: as is."""
    encoder_args: Arguments = Field({})
    """What another encoder than arrays needs."""
    transform: ImportPath | None = Field(None, examples=["my_models:normalize"])
    """module:callable that makes of each microbatch (a dict of tensors) the one that the model gets."""
    mask_field: Text = "attention_mask"
    """Field that is nonzero where a token counts and 0 where it is padding."""
    pad_value: float = 0.0
    """Value that fills up the shorter samples of a microbatch."""
    prefetch: int = Field(2, ge=0, le=1024)
    """Microbatches that are read ahead; 0: none."""
