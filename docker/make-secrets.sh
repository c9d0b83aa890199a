#!/bin/sh
# Creates what is missing of the secret files that compose.yaml names: make-secrets.sh [FOLDER]
#
# The folder is for its owner only (mode 700). Compose mounts each file by itself and keeps its mode, and the containers run
# as users of their own: so the files in it can be read by whoever gets one (444).
set -eu

folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 700 "$folder"

random() {
    od -An -N 24 -tx1 /dev/urandom | tr -d ' \n'
}

# NAME CONTENT
keep() {
    [ -e "$folder/$1" ] && return 0
    umask 077
    printf '%s' "$2" > "$folder/$1"
    chmod 444 "$folder/$1"
    echo "created $folder/$1"
}

keep postgres_password "$(random)"
keep prefect_db_password "$(random)"
keep mlflow_db_password "$(random)"
keep prefect_auth "admin:$(random)"
keep mlflow_admin_password "$(random)"
keep mlflow_secret_key "$(random)"
# For artifacts on S3: replace it by [default], aws_access_key_id = ..., aws_secret_access_key = ...
keep aws_credentials ""
