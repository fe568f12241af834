"""The data of a training as a stream of batches, from raw or from encoded examples."""

from fluxjax.arguments import convert_arguments
from fluxjax.train.cached_batches import CachedBatches
from fluxjax.train.data_settings import DataSettings
from fluxjax.train.encoders import Encoders
from fluxjax.train.ordered import WHOLE_SHARE, ProcessShare
from fluxjax.train.raw_batches import RawBatches


@convert_arguments
def open_batches(
    settings: DataSettings,
    *,
    batch_size: int,
    encoders: Encoders | None = None,
    share: ProcessShare = WHOLE_SHARE,
) -> RawBatches | CachedBatches:
    """Return the batches of a training, from the cache if the settings name one.

    **Arguments:** `settings`: of the data. `batch_size`: of all processes together. `encoders`:
    from `load_encoders`, for data without a cache. `share`: whose rows are read: process
    `jax.process_index()` of `jax.process_count()`.
    **Raises:** as `CachedBatches` and `RawBatches`; `ValueError` without a cache and encoders.
    """
    if settings.cache is not None:
        return CachedBatches(settings, batch_size=batch_size, share=share)
    if encoders is None:
        raise ValueError(
            "`open_batches(encoders)` is needed for data without a cache. Pass "
            "`load_encoders(model)`, or encode the data first."
        )
    return RawBatches(settings, encoders, batch_size=batch_size, share=share)
