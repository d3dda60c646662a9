"""Opens each file of a folder as the subjects and shards steps do, and prints a line of JSON on each. Run by `test_fuzz`.

A file that takes longer than the limit ends the process with a traceback, as a crash of a library does.
"""

import faulthandler
import json
import sys
import traceback
from pathlib import Path

import av

from refalign.config.presets import toy
from refalign.curation.shots import iter_windows
from refalign.errors import DataError
from refalign.io.decoding import find_stream, open_container
from refalign.io.video import ClipSpec, probe_duration_s, read_clips

LIMIT_S = 10


def use(path, config):
    """The reason that the file ends with, empty where clips of it can be written, and its message."""
    windows, reason, message = [], "", ""
    try:
        duration_s = probe_duration_s(path, config.curation)
        windows = list(iter_windows(path, config, duration_s=duration_s))
        reason = "" if windows else "TOO_SHORT"
    except DataError as error:
        reason, message = error.reason, str(error)
    except Exception:
        return "CRASH", traceback.format_exc()
    if not reason:
        specs = [ClipSpec(w.start_s(config.video.fps), (0, 0, w.frame_size_px[1], w.frame_size_px[0])) for w in windows]
        try:
            clips = read_clips(path, specs, config.video, config.curation)
        except Exception:
            return "CRASH", traceback.format_exc()
        if any(len(clip) != config.video.num_frames for clip in clips):
            return "CRASH", f"{path}: a clip is short"
    return reason, message


def complains(path):
    """Whether libav says that something is wrong with a file, by an error, its log or a flag."""
    with av.logging.Capture() as log:
        try:
            with open_container(path) as container:
                stream = find_stream(path, container)
                stream.thread_count = 1
                num_frames, is_flagged = 0, False
                for packet in container.demux(stream):
                    is_flagged |= packet.is_corrupt
                    if packet.size or packet.dts is None:
                        for frame in packet.decode():
                            num_frames, is_flagged = num_frames + 1, is_flagged or frame.is_corrupt
        except (av.error.FFmpegError, DataError, UnicodeDecodeError, ValueError):
            return True
    return is_flagged or not num_frames or any(level <= av.logging.ERROR for level, _, _ in log)


def main():
    """Reads the files of the folder that the command line names."""
    av.logging.set_level(av.logging.ERROR)
    config = toy()
    for path in sorted(Path(sys.argv[1]).iterdir()):
        print(json.dumps({"begins": path.name}), flush=True)
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        reason, message = use(path, config)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"name": path.name, "reason": reason, "message": message, "complains": complains(path)}), flush=True)


if __name__ == "__main__":
    main()
