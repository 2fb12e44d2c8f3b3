# Sourced by scripts/demo and scripts/test: use the active virtual environment, or make one in .venv, and install into it.
# Usage: prepare EXTRAS [CONSTRAINTS], for instance: prepare "[test,parity,field]"
prepare() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        local python=${PYTHON:-python3}
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "depthdiff needs Python 3.10 or newer, $python is $("$python" --version); set PYTHON" >&2
            exit 1
        }
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        # shellcheck disable=SC1091
        source .venv/bin/activate
    fi
    python -m pip install -q -c "${2:-constraints.txt}" -e ".$1"
}
