# sh tools/setup/timed.sh WHAT COMMAND...: say what is done, do it, say how long it took.
#
# In a terminal COMMAND shows its own progress. In a log a line every ten seconds has the last that it said; all of it
# follows if it fails. Installers say nothing while they unpack gigabytes: the size of .venv then shows that they do.
what=$1
shift
VENV=${VENV:-.venv}
started=$(date +%s)
log=$(mktemp) || exit 1
trap 'kill "$beating" 2>/dev/null; rm -f "$log"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

seconds() { echo "$(($(date +%s) - started)) s"; }
size() { du -sh "$VENV" 2>/dev/null | cut -f1; }

# Ends within a beat of its parent, however that ends: Ctrl-C does not reach it. Its sleep must not hold a pipe open.
beat() {
    last=$(size)
    while sleep "${BEAT:-10}" >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        now=$(size)
        if [ ! -t 1 ]; then
            said=$(grep -Ev '^WARNING|ninstall' "$log" | tail -n 1 | sed 's/^ *//' | cut -c 1-72)
            echo "  $(seconds), ${now:-nothing} in $VENV${said:+: $said}"
        elif [ "$now" != "$last" ]; then # else a bar of the installer moves
            echo "  $(seconds), $now in $VENV"
        fi
        last=$now
    done
}

echo "$what ..."
beat &
beating=$!
if [ -t 1 ]; then
    "$@"
else
    PIP_PROGRESS_BAR=off "$@" >"$log" 2>&1
fi
status=$?
if [ "$status" = 0 ]; then
    echo "  took $(seconds)"
else
    cat "$log" >&2
    echo "$what: failed after $(seconds)" >&2
fi
exit "$status"
