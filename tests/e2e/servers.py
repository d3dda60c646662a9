"""PostgreSQL and MLflow on loopback, started by the scripts of infra/ themselves."""

import os
import secrets
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from local_cluster import find_ports

from tests.serving import serving

ROOT = Path(__file__).resolve().parents[2]
_NOT_ROOT = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
"""PostgreSQL refuses to run as root."""


@contextmanager
def postgres(folder):
    """Yields the environment that leads libpq to a new server with the roles and databases of infra/postgres/init.sh."""
    import pgserver

    binaries = Path(pgserver.__file__).parent / "pginstall/bin"
    (port,) = find_ports(1)
    folder.mkdir(mode=0o755)
    for parent in [folder, *folder.parents]:  # pytest's folders are closed to others
        with suppress(PermissionError):
            parent.chmod(parent.stat().st_mode | 0o011)
    if _NOT_ROOT:
        import shutil

        shutil.chown(folder, **_NOT_ROOT)
    passwords = {name: secrets.token_hex(16) for name in ("postgres", "mlflow", "airflow")}
    first = folder / "password"
    first.write_text(passwords["postgres"])
    first.chmod(0o644)

    def call(*command):
        subprocess.run(command, check=True, capture_output=True, **_NOT_ROOT)

    flags = ["--username=postgres", f"--pwfile={first}", "--auth=scram-sha-256", "--no-locale", "--encoding=UTF8"]
    call(binaries / "initdb", f"--pgdata={folder / 'data'}", *flags)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
    call(binaries / "pg_ctl", "start", "-w", f"--pgdata={folder / 'data'}", f"--log={folder / 'log'}", f"--options={options}")
    # The scripts call the host by its name in compose.yaml; libpq takes the address from here.
    place = {"PGHOST": "postgres", "PGHOSTADDR": "127.0.0.1", "PGPORT": str(port)}
    wanted = {"PGPASSWORD": passwords["postgres"], "MLFLOW_DB_PASSWORD": passwords["mlflow"]}
    path = {"PATH": f"{binaries}:{os.environ['PATH']}", "AIRFLOW_DB_PASSWORD": passwords["airflow"]}
    try:
        subprocess.run(["sh", ROOT / "infra/postgres/init.sh"], check=True, env=os.environ | place | wanted | path)
        yield place | {"PGPASSWORD": passwords["mlflow"]}
    finally:
        call(binaries / "pg_ctl", "stop", "--mode=immediate", f"--pgdata={folder / 'data'}")


@contextmanager
def mlflow_server(folder, database):
    """Yields the address and the admin's password of infra/mlflow/start.sh, over the S3 server of the environment."""
    (port,) = find_ports(1)
    password = secrets.token_hex(12)
    environment = (
        os.environ
        | database
        | {
            "MLFLOW_HOST": "127.0.0.1",
            "MLFLOW_PORT": str(port),
            "MLFLOW_ALLOWED_HOSTS": f"127.0.0.1:{port}",
            "MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "infra/mlflow/basic_auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
    )
    address = f"http://127.0.0.1:{port}"
    folder.mkdir()
    command = ["sh", str(ROOT / "infra/mlflow/start.sh")]
    with serving(command, f"{address}/health", log=folder / "log", cwd=folder, env=environment):
        yield address, password
