# shellcheck shell=sh
# What scripts/start and scripts/test share. A plain POSIX shell reads it; it sets $root, goes
# there, and offers `setup base` and `setup all`, which leave a working .venv in the checkout.
#
# Besides .venv and what a build leaves in the checkout nothing is changed, but for the Debian
# packages which are missing, and those only where the caller is root.

set -u

# Where a caller's own Python settings could lead the builds astray.
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONPLATLIBDIR CDPATH
unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_REQUIRE_VIRTUALENV PIP_NO_BUILD_ISOLATION
[ -n "${HOME-}" ] || unset HOME
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONNOUSERSITE=1

root=$(cd -- "$(dirname -- "$0")/.." && pwd -P) || exit 1
cd -- "$root" || exit 1

venv=.venv
stamp=$venv/dedup.stamp
work=
keep_work=
live=

say() {
    printf 'dedup: %s\n' "$*"
}

fail() {
    printf 'dedup: %s\n' "$@" >&2
    exit 1
}

is_root() {
    [ "$(id -u)" -eq 0 ]
}

# On every way out: end the process that a script started, drop the temporary folder, and, where
# root worked in another user's checkout, hand over what was made there.
cleanup() {
    if [ -n "$live" ]; then
        kill "$live" 2>/dev/null
        wait "$live" 2>/dev/null
        live=
    fi
    [ -z "$work" ] || [ -n "$keep_work" ] || rm -rf -- "$work"
    if is_root && [ "$(stat -c %u pyproject.toml)" -ne 0 ]; then
        for made in "$venv" build dedup ./*.egg-info .*_cache .hypothesis; do
            [ ! -e "$made" ] || chown -R -h --reference=pyproject.toml -- "$made"
        done
    fi
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

work=$(mktemp -d "${TMPDIR:-/tmp}/dedup.XXXXXX") || exit 1
log=$work/setup.log

# quietly NEXT COMMAND...: run it, its output going to the log only; when it fails, show the end
# of that log and NEXT, the next thing to do, and return its status.
quietly() {
    quietly_next=$1
    shift
    printf '+ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null && return 0
    quietly_status=$?
    {
        tail -n 30 -- "$log"
        # A compiler's own words often stand far above the end.
        grep -E '\.(pyx|pxd|c|h):[0-9]+:[0-9]+:|^ *(ERROR|E):' -- "$log" | head -n 10
    } >&2
    keep_log
    printf 'dedup: %s\n' \
        "this failed (status $quietly_status): $*" \
        "the whole log is $log" \
        "$quietly_next" >&2
    return "$quietly_status"
}

# Puts the log where it outlives this script.
keep_log() {
    if [ -d "$venv" ] && cp -- "$log" "$venv/setup.log"; then
        log=$root/$venv/setup.log
    else
        keep_work=1
    fi
}

# --- Which Python --------------------------------------------------------------------------------

# Prints the interpreter itself, not the shim or the environment through which it was reached.
probe_python='
import os, sys
if sys.version_info < (3, 11) or sys.implementation.name != "cpython":
    sys.exit(1)
print(os.path.abspath(getattr(sys, "_base_executable", None) or sys.executable))
'

probe_complete='
import ensurepip, os, sysconfig, venv
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
'

# Sets $python to the first Python >= 3.11 that can make environments and compile; if none can,
# to the first of the system itself, which packages can complete; if there is none, to nothing.
find_python() {
    python=
    find_system=
    for find_name in python3 python3.14 python3.13 python3.12 python3.11 python \
        /usr/local/bin/python3 /usr/bin/python3 \
        /usr/bin/python3.14 /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11; do
        command -v "$find_name" >/dev/null 2>&1 || continue
        find_real=$("$find_name" -I -c "$probe_python" 2>/dev/null </dev/null) || continue
        if "$find_real" -I -c "$probe_complete" >/dev/null 2>&1 </dev/null; then
            python=$find_real
            return 0
        fi
        case $find_real in
            /usr/bin/*) [ -n "$find_system" ] || find_system=$find_real ;;
        esac
    done
    python=$find_system
}

# The Debian packages of a Python >= 3.11, for a machine that has none.
python_packages() {
    for packages_name in python3 python3.14 python3.13 python3.12 python3.11; do
        packages_version=$(LC_ALL=C apt-cache policy "$packages_name" 2>/dev/null |
            sed -n 's/^ *Candidate: *//p')
        case $packages_version in
            3.1[1-9]* | 3.[2-9][0-9]*)
                printf '%s\n' "$packages_name $packages_name-venv $packages_name-dev"
                return 0
                ;;
        esac
    done
    return 1
}

# --- What the system lacks -----------------------------------------------------------------------

# compiles FLAG...: whether the C program on standard input becomes a shared object.
compiles() {
    # shellcheck disable=SC2086 # $compiler is a command with its options
    $compiler -shared -fPIC -x c - -o "$work/probe.so" "$@" >>"$log" 2>&1
}

# Sets $missing to the packages without which $1 cannot make environments and compile modules.
find_missing() {
    missing=
    find_for=$1
    find_version=$("$find_for" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        return 1
    find_prefix=python$find_version
    if [ "$(/usr/bin/python3 -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' \
        2>/dev/null)" = "$find_version" ]; then
        find_prefix=python3
    fi

    "$find_for" -I -c 'import ensurepip, venv' >/dev/null 2>&1 || missing="$missing $find_prefix-venv"

    compiler=${CC-}
    [ -n "$compiler" ] || compiler=$("$find_for" -I -c \
        'import sysconfig; print(sysconfig.get_config_var("CC") or "cc")' 2>>"$log")
    if ! command -v "${compiler%% *}" >/dev/null 2>&1; then
        # The compiler that this Python was built with is not here; any other does as well.
        for find_name in gcc cc clang; do
            if command -v "$find_name" >/dev/null 2>&1; then
                compiler=$find_name
                export CC="$find_name"
                break
            fi
        done
    fi
    find_include=$("$find_for" -I -c \
        'import sysconfig; print(sysconfig.get_path("include"))' 2>>"$log")
    if ! command -v "${compiler%% *}" >/dev/null 2>&1; then
        missing="$missing gcc"
        [ -e /usr/include/stdio.h ] || missing="$missing libc6-dev"
        [ -e "$find_include/Python.h" ] || missing="$missing $find_prefix-dev"
    elif ! printf '#include <stdio.h>\nint f(void) { return puts(""); }\n' | compiles; then
        missing="$missing gcc libc6-dev"
        [ -e "$find_include/Python.h" ] || missing="$missing $find_prefix-dev"
    elif ! printf '#include <Python.h>\nPyObject *f(void) { return PyList_New(0); }\n' |
        compiles -I"$find_include"; then
        missing="$missing $find_prefix-dev"
    fi
    missing=${missing# }
}

apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@"
}

# install_packages NAME...: as root, install them; without root, say what to type, and stop.
install_packages() {
    command -v apt-get >/dev/null 2>&1 ||
        fail "missing on this machine: $* (these are Debian's names)." \
            "There is no apt-get here: install the like with the system's own tool, then try again."
    is_root || fail "missing on this machine: $*. Type this, then run the script again:" \
        "    $(sudo_line "$@")"
    say "installing Debian packages: $*"
    # One unreachable source among several need not matter: the install decides.
    apt update >>"$log" 2>&1 </dev/null || :
    quietly "Once apt-get works on this machine, run the script again." \
        apt install --no-install-recommends "$@" || exit 1
}

sudo_line() {
    sudo_update=
    ls /var/lib/apt/lists/*_Packages* >/dev/null 2>&1 || sudo_update='sudo apt-get update && '
    printf '%s\n' "${sudo_update}sudo apt-get install -y $*"
}

# Sets $programs to the Debian packages of the programs that the tests start, as far as they are
# not here; what is too large is left out (tests/allowed_skips.txt).
find_programs() {
    programs=
    for find_pair in redis-server:redis-server nginx:nginx-light perl:perl php:php-cli \
        lua5.4:lua5.4 swipl:swi-prolog-nox prometheus-node-exporter:prometheus-node-exporter \
        qemu-system-x86_64:qemu-system-x86 gcore:gdb; do
        command -v "${find_pair%%:*}" >/dev/null 2>&1 || programs="$programs ${find_pair#*:}"
    done
    programs=${programs# }
}

# install_programs NAME...: Debian starts a server when its package is installed, and at every
# boot. The tests want the program only, so for this one install the two commands with which
# packages start their servers are others that do nothing, and no server is started at boot either.
install_programs() {
    say "installing Debian packages: $* (their services stay off)"
    mkdir -p -- "$work/no-service" || exit 1
    for programs_stub in invoke-rc.d deb-systemd-invoke; do
        printf '#!/bin/sh\nexit 0\n' >"$work/no-service/$programs_stub"
        chmod 755 "$work/no-service/$programs_stub"
    done
    apt update >>"$log" 2>&1 </dev/null || :
    quietly "Once apt-get works on this machine, run the script again." \
        apt -o DPkg::Path="$work/no-service:/usr/sbin:/usr/bin:/sbin:/bin" \
        install --no-install-recommends "$@" || exit 1
    for programs_service in redis-server nginx prometheus-node-exporter; do
        case " $* " in
            *" $programs_service "* | *" $programs_service-light "*) ;;
            *) continue ;;
        esac
        update-rc.d "$programs_service" disable >>"$log" 2>&1 || :
        if command -v systemctl >/dev/null 2>&1; then
            systemctl disable "$programs_service.service" >>"$log" 2>&1 || :
        fi
    done
}

# Sets $python, installing what is missing for it.
need_python() {
    find_python
    if [ -z "$python" ]; then
        if is_root && command -v apt-get >/dev/null 2>&1; then
            apt update >>"$log" 2>&1 </dev/null || :
        fi
        need_names=$(python_packages) || need_names="python3 python3-venv python3-dev"
        need_names="$need_names gcc libc6-dev"
        # shellcheck disable=SC2086 # a list of names
        install_packages $need_names
        find_python
        [ -n "$python" ] ||
            fail "this needs Python 3.11 or newer, and neither this machine nor its packages have" \
                "one. Install one (any python3.11 to python3.14 on the PATH is found), then run" \
                "the script again."
    fi
    need_complete "$python"
}

need_complete() {
    find_missing "$1" || fail "$1 does not work. Remove it or repair it, then try again."
    [ -n "$missing" ] || return 0
    # shellcheck disable=SC2086 # a list of names
    install_packages $missing
    find_missing "$1"
    if [ -n "$missing" ]; then
        keep_log
        fail "$1 still cannot make an environment and compile a module, though the packages are" \
            "installed: something else is amiss with $missing. The log is $log"
    fi
}

# --- The environment -----------------------------------------------------------------------------

checksum() {
    sha256sum | cut -d ' ' -f 1
}

# An environment is tied to where it lies and to its Python.
environment_id() {
    environment_python=$("$venv/bin/python" -I -c \
        'import sys; print(sys.version, sys.base_prefix, sys.prefix)' 2>/dev/null </dev/null) ||
        return 1
    printf '%s\n' "$root" "$environment_python" | checksum
}

# What the compiled module and the list of dependencies are made from.
source_id() {
    {
        printf '%s\n' "${DEDUP_DEBUG-}" "${CC-}" "${CFLAGS-}" "${LDFLAGS-}"
        find pyproject.toml setup.py dedup -type f \( -name pyproject.toml -o -name setup.py \
            -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.h' \) -print |
            LC_ALL=C sort | while IFS= read -r source_file; do
            sha256sum "$source_file"
        done
    } | checksum
}

stamped() {
    sed -n "s/^$1 //p" "$stamp" 2>/dev/null
}

# Sets $extension to how the name of a module compiled for this Python ends.
find_extension() {
    extension=$("$venv/bin/python" -I -c \
        'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))' 2>/dev/null </dev/null)
}

# Whether every module that is to be compiled in place has been.
built() {
    find dedup -type f -name '*.pyx' | while IFS= read -r built_source; do
        [ -s "${built_source%.pyx}$extension" ] || exit 1
    done
}

# Takes away what was compiled, so that the next build compiles anew.
unbuild() {
    find dedup -type f -name '*.pyx' | while IFS= read -r unbuild_source; do
        rm -f -- "${unbuild_source%.pyx}.c" "${unbuild_source%.pyx}.cpp" \
            "${unbuild_source%.pyx}$extension"
    done
}

# intact base|all: whether what was installed with these extras is still there.
intact() {
    intact_modules='numpy click pip'
    [ "$1" = base ] || intact_modules="$intact_modules pytest hypothesis mypy"
    # shellcheck disable=SC2086 # a list of names
    [ -x "$venv/bin/dedup" ] && "$venv/bin/python" -I -c '
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
distribution("dedup-ksm")
sys.exit(not all(map(find_spec, sys.argv[1:])))
' $intact_modules >/dev/null 2>&1 </dev/null
}

# Whether .venv has a Python and a pip that do for this.
usable() {
    "$venv/bin/python" -I -c "$probe_python" >/dev/null 2>&1 </dev/null &&
        "$venv/bin/python" -I -m pip --version >/dev/null 2>&1 </dev/null
}

make_environment() {
    need_python
    say "making .venv with $("$python" --version) ($python)"
    rm -rf -- "$venv" || fail "remove .venv (sudo rm -rf '$root/.venv'), then run the script again."
    # The stamp tells what was made here and was not finished from what somebody else put here.
    mkdir -- "$venv" && printf 'unfinished\n' >"$stamp" || exit 1
    quietly "Run the script again once the cause is mended." "$python" -m venv "$venv" || exit 1
}

# Sets $have to what .venv is: `ready`; `usable`, if the package has to be built or installed in
# it; or `nothing`, if it must be made anew.
judge_environment() {
    have=nothing
    if [ ! -e "$stamp" ]; then
        # None, or one that somebody made by hand: if it works it will do.
        ! usable || have=usable
        return 0
    fi
    [ -n "$environment" ] && [ "$(stamped environment)" = "$environment" ] && usable || return 0
    have=usable
    judge_extras=$(stamped extras)
    [ -n "$judge_extras" ] || return 0
    if ! intact "$judge_extras"; then
        have=nothing
        return 0
    fi
    [ "$judge_extras" != all ] || extras=all
    if [ "$judge_extras" = "$extras" ] && [ "$(stamped source)" = "$source" ] && find_extension &&
        built; then
        have=ready
    fi
}

# setup base|all: leaves a .venv in which this checkout and its extras are installed.
setup() {
    extras=$1
    if command -v flock >/dev/null 2>&1; then
        exec 9<"$root/scripts"
        flock -n 9 || {
            say "waiting for another setup of this checkout"
            flock 9
        }
    fi
    if [ -e "$venv" ] && [ ! -w "$venv" ] && ! is_root; then
        fail ".venv belongs to another user. Type this, then run the script again:" \
            "    sudo rm -rf '$root/.venv'"
    fi

    source=$(source_id)
    environment=$(environment_id) || environment=
    judge_environment
    case $have in
        ready)
            exec 9<&-
            return 0
            ;;
        usable) need_complete "$venv/bin/python" ;;
        nothing)
            make_environment
            environment=$(environment_id) || fail ".venv/bin/python does not run."
            ;;
    esac

    say "building, and installing what it needs (a minute or so the first time)"
    find_extension || fail ".venv/bin/python does not run."
    printf 'unfinished\n' >"$stamp" || exit 1
    unbuild
    setup_target=.
    [ "$extras" = base ] || setup_target=".[$extras]"
    if ! quietly "$setup_next" "$venv/bin/python" -I -m pip install --editable "$setup_target"; then
        # pip installs nothing before everything is built, so the environment is still good.
        printf 'environment %s\n' "$environment" >"$stamp"
        exit 1
    fi
    printf 'environment %s\n' "$environment" >"$stamp"
    quietly "The build went through, but what was built cannot be imported: see above." \
        "$venv/bin/python" -I -c 'import dedup, dedup._core' || exit 1
    printf '%s %s\n' source "$source" extras "$extras" >>"$stamp"
    exec 9<&-
}

setup_next="If those lines speak of a connection, see to the network; if of a compiler, to the
dedup: source; then run the script again. To start afresh: rm -rf '$root/.venv'"
