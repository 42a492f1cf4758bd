"""A run in a tracker (wandb, TensorBoard, trackio): accelerate's trackers, fed by a thread of their own.

Whatever a tracker waits for, training does not: records wait in a queue. A wandb server that refuses or
hangs makes the run an offline one, which `wandb sync` accepts later; what is not sent when the run is over
may take `CLOSE` seconds more. Only rank 0 has a tracker; a job is one run in it, however often it is resumed.
"""

import importlib
import importlib.util
import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from resist_ds.errors import UserError
from resist_ds.files import content, status
from resist_ds.nets import late
from resist_ds.options.config import Config
from resist_ds.state.start import Start

START = 20.0  # seconds that a server has to answer before the run goes offline
CLOSE = 30.0  # seconds that a tracker has to take what is left when the run is over
AXES = (
    "global_step",
    "samples_seen",
    "round",
    "perf/wall_s",
    "comm/bytes_total",
)  # that figures are drawn over


class Tracker:
    """One run in the tracker that `--log_with` names; none of its methods waits, but for `close`.

    Args:
        settings: every option, and what was derived from them.
        folder: of the run.
        start: what the run begins from; one that goes on in its folder goes on in the tracker.
        say, warn: take a line for the person at the terminal.
    """

    def __init__(
        self,
        config: Config,
        settings: Mapping[str, Any],
        folder: Path,
        start: Start,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ):
        self._broken: Exception | None = None
        try:  # here: two threads that import may wait for each other
            late.run(importlib.import_module(config.log_with))  # and whole
            _be_alone()
        except Exception as error:  # a package that is there and broken
            self._broken = error
        self._config = config
        # Bytes that are no text, typed, are none that every tracker takes.
        self._name = config.run_name and config.run_name.encode(errors="replace").decode()
        self._settings = dict(settings)
        self._folder = folder
        self._start = start
        self._say = say
        self._warn = warn
        self._failed = False
        self._exit_code = 0
        self._todo: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add figures; wandb draws them over any of `AXES`, the others over local steps."""
        step = {} if self._config.log_with == "wandb" else {"step": metrics.get("global_step")}
        self._do(lambda tracker: tracker.log(dict(metrics), **step))

    def pictures(self, draw: Callable[[], Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            draw: returns {name: uint8 [height, width, 3]}.
        """

        def log(tracker: Any) -> None:
            if tracker.name == "trackio":  # accelerate passes it no images
                import trackio

                tracker.log({name: trackio.Image(pixels) for name, pixels in draw().items()})
                return
            kind = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None] for name, pixels in draw().items()}, **kind)

        self._do(log)

    def close(self, exit_code: int) -> None:
        """End the run there, as failed if `exit_code` is not 0."""
        self._exit_code = exit_code
        self._todo.put(None)
        self._thread.join(CLOSE)
        if self._thread.is_alive():
            # wandb's own log may lack the end, too: its service ends with this process.
            self._warn(
                f"{self._config.log_with} has not taken everything after {CLOSE:g} s; "
                f"{self._folder}/metrics.jsonl has it all"
            )

    @property
    def _is_wandb(self) -> bool:
        return self._config.log_with == "wandb"

    def _do(self, work: Callable[[Any], None]) -> None:
        if not self._failed:
            self._todo.put(work)

    def _work(self) -> None:
        """The life of the thread."""
        name = self._config.log_with
        try:
            if self._broken is not None:
                raise self._broken
            tracker = self._begin()
        except Exception as error:  # a tracker that is down must not stop a run; metrics.jsonl has it all
            self._failed = True
            self._warn(f"{name} could not be started, going on without it: {_first_line(error)}")
            return
        try:
            while (work := self._todo.get()) is not None:
                work(tracker)
        except Exception as error:
            self._failed = True
            self._warn(f"{name} failed, going on without it: {_first_line(error)}")
        try:
            if self._exit_code and self._is_wandb:  # it shows as failed there
                tracker.tracker.finish(exit_code=self._exit_code)
            else:
                tracker.finish()
        except Exception as error:
            self._warn(f"{name} could not be closed: {_first_line(error)}")

    def _begin(self) -> Any:
        config, start = self._config, self._start
        if config.log_with == "tensorboard":
            # Its table of hyper-parameters takes scalars alone.
            flat = {
                k: v if isinstance(v, bool | int | float) else _text(v) for k, v in self._settings.items()
            }
            # What a run that was interrupted had written beyond its checkpoint is written again.
            return self._init(flat, purge_step=start.position.step + 1 if start.here else None)
        identity = self._identity()
        if config.log_with == "trackio":
            import trackio.run

            # It would ask Hugging Face for the user's name, and tell that.
            trackio.run.Run._get_username = lambda self: None  # type: ignore[method-assign]
            # It knows runs by name alone; two jobs may have the same.
            name = f"{self._name}-{identity}" if self._name else identity
            return self._init(self._settings, name=name, resume="allow", auto_log_gpu=False)
        tracker = self._wandb(identity)
        for axis in AXES:
            tracker.tracker.define_metric(axis)
        tracker.tracker.define_metric("*", step_metric=AXES[0])
        return tracker

    def _wandb(self, identity: str) -> Any:
        """A run at wandb's server if one is asked for and answers, else an offline one."""
        settings, environment = self._settings, os.environ
        options: dict[str, Any] = {
            "id": identity,
            "resume": "allow",
            "name": self._name,
            "dir": str(self._folder),
            "settings": _wandb_settings(),
        }
        # wandb's own variables win over what we would choose.
        if "WANDB_RUN_GROUP" not in environment:
            options["group"] = f"{settings['model']} {settings['dataset']}"
        if "WANDB_JOB_TYPE" not in environment:
            options["job_type"] = settings["strategy"]
        if "WANDB_TAGS" not in environment:
            options["tags"] = [settings["strategy"], *(f"{name}={settings[name]}" for name in "WRK")]
        mode = _theirs().mode  # `wandb offline` and `wandb disabled` are kept in a file
        if mode in ("disabled", "offline", "dryrun"):
            return self._init(settings, mode=mode, **options)
        key = _has_key()
        if key or self._config.wandb_project or "WANDB_MODE" in environment:
            answered = False
            try:
                _ask_server(key)
                answered = True
                tracker = self._init(settings, mode="online", **options)
                self._say(f"wandb: {tracker.tracker.url}")
                return tracker
            except Exception as error:
                self._warn(
                    f"wandb is offline ({_first_line(error)}); later, wandb sync {self._folder}/wandb/*run-* "
                    "sends this run"
                )
            if answered:  # its server answered, and then failed: its id is taken here
                options["id"] = self._identity(new=True)
        return self._init(settings, mode="offline", **options)

    def _init(self, hyperparameters: dict[str, Any], **options: Any) -> Any:
        """Accelerate's tracker of one kind, started."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[self._config.log_with]
        project = self._config.wandb_project or os.environ.get("WANDB_PROJECT") or "resist_ds"
        folder = (str(self._folder),) if kind.requires_logging_directory else ()
        tracker = kind(project, *folder, **options)
        tracker.start()
        tracker.store_init_configuration(hyperparameters)
        return tracker

    def _identity(self, new: bool = False) -> str:
        """The run's id in the tracker: a sweep's, that of the job which goes on, or a new one."""
        file = self._folder / "tracker_run"
        given = os.environ.get("WANDB_RUN_ID") if self._is_wandb and not new else None
        if given is None and self._start.here and not new and status(file) is not None:
            before = content(file).decode(errors="replace").strip()  # another id would make it another run
            if before:
                return before
        identity = given or secrets.token_hex(4)
        beside = file.with_name(f".{file.name}")
        beside.write_text(f"{identity}\n")
        beside.replace(file)  # at once, so that a run that is killed meanwhile has the one or the other
        return identity


def is_wanted(config: Config) -> bool:
    """Whether there is to be a run in a tracker: wandb's is called off by variables of its own, too."""
    if config.log_with == "wandb":
        said = os.environ.get("WANDB_DISABLED", "").strip().lower()  # as Hugging Face's programs know it
        if said in ("true", "1", "yes", "on", "t", "y"):
            return False
        return os.environ.get("WANDB_MODE", "").strip().lower() != "disabled"
    return config.log_with != "none"


def check(config: Config) -> None:
    """Raises `UserError` where the package of `--log_with` is not installed."""
    if is_wanted(config) and importlib.util.find_spec(config.log_with) is None:
        raise UserError(
            f"--log_with {config.log_with}: type pip install {config.log_with}, or --log_with none"
        )


def _be_alone() -> None:
    """Make accelerate's state, which its trackers ask: here the one process that has a tracker.

    It would read the launcher's variables by rules of its own, and join what they speak of.
    """
    from accelerate import PartialState
    from accelerate.utils import clear_environment

    with clear_environment():
        PartialState(cpu=True)


def _wandb_settings() -> Any:
    """No host, no user, no paths, no code, no copy of the terminal: what a run is, its options say."""
    import wandb

    return wandb.Settings(
        init_timeout=START,
        silent=True,
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        host="",
        username="",
        program="train.py",
        x_executable="",
    )


def _has_key() -> bool:
    """Whether there is a key for wandb's server, so that it need not ask for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import requests

    return bool(_theirs().api_key) or requests.utils.get_netrc_auth(_server()) is not None


def _ask_server(key: bool) -> None:
    """Raises an error that says why wandb's server is not there; its own client would try again for long."""
    import requests

    if not key:  # wandb would ask for one, and nobody may be there
        raise ConnectionError("there is no key, type wandb login")
    try:
        requests.get(_server(), timeout=START, stream=True).close()  # whatever it answers, it does
    except requests.Timeout:
        raise ConnectionError(f"{_server()} has not answered for {START:g} s") from None
    except requests.RequestException:
        raise ConnectionError(f"{_server()} cannot be reached") from None


def _server() -> str:
    return str(_theirs().base_url)


def _theirs() -> Any:
    """wandb's settings as its variables and files say."""
    import wandb

    return wandb.setup().settings


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
