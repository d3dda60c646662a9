"""What each source's file is, by its content: size and sampled bytes, read in parallel because object stores answer slowly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from refalign.config import CurationConfig
from refalign.curation.sources.source_video import SourceVideo, refuse
from refalign.errors import BackendUnavailable, DataError
from refalign.io import storage
from refalign.pipeline.outcomes import Outcome, belongs_to_place


def identify_sources(
    sources: Sequence[SourceVideo | Outcome], config: CurationConfig
) -> Iterator[tuple[SourceVideo | Outcome, str]]:
    """Each source with its video id, in order; one whose file need not be opened to be refused becomes an outcome.

    Raises:
        BackendUnavailable: an object store does not answer, or none of the files is there.
    """

    def identify(source: SourceVideo | Outcome) -> tuple[SourceVideo | Outcome, str]:
        if isinstance(source, Outcome):
            return source, ""
        try:
            size_bytes = storage.size_of(source.path)
            if size_bytes == 0:
                raise DataError("EMPTY_FILE", f"{source.name}: 0 bytes")
            if size_bytes > config.max_video_bytes:
                raise DataError(
                    "TOO_LARGE", f"{source.name}: {size_bytes} bytes; curation.max_video_bytes is {config.max_video_bytes}"
                )
            return source, storage.digest_sampled(source.path)
        except DataError as error:
            return refuse(source.name, error), ""

    count, lost = 0, []
    for source, (found, video_id) in zip(sources, storage.in_parallel(identify, sources), strict=True):
        yield found, video_id
        if isinstance(source, SourceVideo):
            count += 1
            lost += [source.path] if isinstance(found, Outcome) and belongs_to_place(found.reason) else []
    if len(lost) == count > 0:
        raise BackendUnavailable(f"{lost[0]}: not there, nor any other of {count} videos that --input names; bring them back.")
