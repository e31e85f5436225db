#!/bin/sh
# make_venv.sh VENV EXTRA: make the virtual environment VENV with this project and its extra EXTRA, or say what is missing.
#
# A suitable Python is 3.10 to 3.12, has venv, and comes with a shared libpython (Triton's Python backend loads it).
# PYTHON=... names one; otherwise the usual names are tried, then uv (where it is installed) provides one.
set -eu
venv=$1
extra=$2

suitable='
import ensurepip, sys, sysconfig, venv
ok = (3, 10) <= sys.version_info[:2] <= (3, 12) and sysconfig.get_config_var("Py_ENABLE_SHARED")
sys.exit(0 if ok else 1)
'

python=
for name in ${PYTHON:-python3 python3.11 python3.12 python3.10}; do
    if command -v "$name" >/dev/null 2>&1 && "$name" -c "$suitable" >/dev/null 2>&1; then
        python=$(command -v "$name")
        break
    fi
done

if [ -n "$python" ]; then
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "$suitable" 2>/dev/null || "$python" -m venv --clear "$venv"
    install="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
elif command -v uv >/dev/null 2>&1; then
    [ -x "$venv/bin/python" ] || uv venv --quiet --python 3.11 --managed-python "$venv"
    install="uv pip install --quiet --python $venv/bin/python"
else
    cat >&2 <<'END'
No suitable Python was found. Needed: CPython 3.10, 3.11 or 3.12 with venv and a shared libpython.
  Debian, Ubuntu:  apt install python3 python3-venv libpython3-dev
  any Linux:       install uv (https://docs.astral.sh/uv/), then run make again: it fetches a Python of its own
  or name one:     make PYTHON=/path/to/python3.11 ...
END
    exit 1
fi

printf 'Installing minitron-trtllm[%s] into %s ...\n' "$extra" "$venv"
# shellcheck disable=SC2086  # the words of $install and of the caller's options are meant to be split
$install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --editable ".[$extra]"
