#!/bin/sh
# Gives the command its secrets: NAME is exported with the content of the file that NAME_FILE names.
set -eu

for name in PGPASSWORD PREFECT_API_AUTH_STRING PREFECT_SERVER_API_AUTH_STRING \
    MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_TRACKING_PASSWORD; do
    file=$(printenv "${name}_FILE" || true)
    [ -n "$file" ] || continue
    value=$(cat "$file")
    [ -n "$value" ] || { echo "entrypoint: $file (${name}_FILE) is empty" >&2; exit 2; }
    export "$name=$value"
    unset "${name}_FILE"
done
exec "$@"
