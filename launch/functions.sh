# shellcheck shell=bash
# Functions that the scripts here share.

# Shell arithmetic runs the command in a value such as `a[$(command)]`. Whatever comes from a file, a name, the command
# line or the environment is checked here before it is used as a number.
whole_number() { # whole_number NAME VALUE: prints VALUE without leading zeros, or ends the subshell with an error
    if [[ ! $2 =~ ^[[:digit:]]{1,18}$ ]]; then
        printf 'error: %s: expected a whole number, found %q\n' "$1" "${2:0:100}" >&2
        exit 2
    fi
    echo "$((10#$2))"
}

write_file() { # write_file PATH TEXT: replaces the file. A link of that name is replaced too, never followed.
    local new
    new=$(mktemp "${1%/*}/.XXXXXXXXXX")
    printf '%s' "$2" >"$new"
    mv -f -T "$new" "$1"
}

make_marker() { # make_marker PATH: an empty file, unless there is one
    if [[ ! -f $1 || -L $1 ]]; then write_file "$1" ''; fi
}

make_run_dir() { # make_run_dir PATH MODE: if it is new; MODE is run.mode
    # shellcheck disable=SC2174 # its parents are as usual
    mkdir -p -m "$2" "$1"
}
