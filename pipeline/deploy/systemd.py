"""systemd units that start what the verbs start, with the flags planned for this machine; keys are read from ``.env``, never written."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import engines
from pipeline.config import Settings
from pipeline.engines.base import Launch
from pipeline.runs.folder import RunFolder
from pipeline.serve.start import LOOPBACK, Options, Target, request_for

_UNIT = """\
[Unit]
Description={what}
After=network.target

[Service]
WorkingDirectory={folder}
EnvironmentFile=-{folder}/.env
{environment}
ExecStart={command}
Restart=on-failure
RestartSec=5
TimeoutStartSec={seconds:.0f}
KillMode=control-group
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
{paths}

[Install]
WantedBy=default.target
"""


def planned_launch(engine_name: str, run: RunFolder, settings: Settings, name: str | None = None) -> Launch:
    """The process that ``serve`` would start for a run on the engine's documented port; nothing is started or checked for."""
    engine = engines.get(engine_name)
    target = Target.of_run(run, engine_name, name or settings.address(engine_name).model or None)
    request = request_for(target, Options("serve", overrides=settings.overrides(engine_name)))
    return engine.launch(engine.plan(request), request, host=LOOPBACK, port=engine.default_port)


def unit(launch: Launch, what: str, folder: Path, writable: Sequence[Path] = ()) -> str:
    """One unit file: started again when it fails, no new privileges, writing only below ``writable``; keys come from ``.env``."""
    # our package, where it is ours and not installed for this interpreter
    environment = {**launch.env, **({"PYTHONPATH": str(Path(__file__).parents[2])} if launch.ours else {})}
    environment |= {"PYTHONUNBUFFERED": "1", "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}
    # one that does not exist yet is passed over: without the dash the unit would not start
    places = " ".join(_quoted(f"-{path}") for path in writable)
    return _UNIT.format(
        what=_text(what),
        folder=_text(str(folder)),
        environment="\n".join(f"Environment={_quoted(f'{key}={value}')}" for key, value in sorted(environment.items())),
        # variables are expanded in this line only
        command=" ".join(_quoted(word).replace("$", "$$") for word in launch.argv),
        seconds=launch.start_timeout,
        paths=f"ReadWritePaths={places}" if places else "ReadOnlyPaths=/",
    )


def _quoted(word: str) -> str:
    """A word as systemd reads it: specifiers escaped, quoted where it must be."""
    plain = _text(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain}"' if not plain or any(c in plain for c in " \t'\"\\;") else plain


def _text(text: str) -> str:
    return text.replace("%", "%%").replace("\n", " ")
