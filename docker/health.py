"""Ask the server or the client in this container whether it is well: `python health.py server|client FOLDER`.

For Docker, which looks at the exit code alone; Kubernetes asks the same endpoints itself. The standard library alone.
"""

from __future__ import annotations

import http.client
import ssl
import sys
import tomllib
from pathlib import Path
from typing import NoReturn

TIMEOUT_S = 4.0


def main() -> NoReturn:
    role, folder = sys.argv[1], Path(sys.argv[2])
    try:
        sys.exit(_complaint(role, folder))
    except (OSError, http.client.HTTPException, tomllib.TOMLDecodeError) as error:
        sys.exit(f"no answer: {error}")


def _complaint(role: str, folder: Path) -> str | None:
    settings = tomllib.loads((folder / ("server.toml" if role == "server" else "site.toml")).read_text())
    listen = settings["listen"] if role == "server" else settings.get("health", {}).get("listen")
    if not listen:
        return f'{folder}/site.toml: write listen = "127.0.0.1:9100" under [health], and start again'
    port = int(listen.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    if role == "server":
        # The federation's own authority; the name in the certificate is the public one, not this container's.
        tls = ssl.create_default_context(cafile=folder / "authority" / "ca.pem")
        tls.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=tls)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    text = answer.read(2000).decode(errors="replace").strip()
    connection.close()
    return None if answer.status == 200 else f"{answer.status}: {text}"


if __name__ == "__main__":
    main()
