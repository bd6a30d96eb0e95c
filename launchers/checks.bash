# What the scripts beside this file check before they start anything; they source it. One line, and exit code 2.
# root is the repository; DS_CONFIG is found here, since all of them take it.

refuse() { # message
    echo "$(basename "$0"): $1" >&2
    exit 2
}

need_count() { # name of a variable
    [[ "${!1}" =~ ^[1-9][0-9]*$ ]] ||
        refuse "$1 is '${!1}'; it must be a whole number >= 1. Change it, or leave it out."
}

need_file() { # name of a variable that holds a path seen from the caller's folder; it becomes absolute
    [[ -r "${!1}" && ! -d "${!1}" ]] ||
        refuse "$1 is '${!1}', but seen from $PWD there is no such file to read. Change it, or leave it out."
    [[ "${!1}" == /* ]] || printf -v "$1" '%s' "$PWD/${!1}"
}

: "${DS_CONFIG:=${root:?}/ds_configs/quickstart.json}"
need_file DS_CONFIG
