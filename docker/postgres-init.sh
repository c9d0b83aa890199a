#!/bin/sh
# Runs once, on an empty data folder: a role and databases of its own for each server.
set -eu

# owner FILE_WITH_PASSWORD DATABASE... ; the password goes through standard input, so that no command line has it
create() {
    owner=$1
    password=$(cat "$2")
    shift 2
    {
        echo "CREATE ROLE $owner LOGIN PASSWORD '$password';"
        for database in "$@"; do
            echo "CREATE DATABASE $database OWNER $owner;"
            echo "REVOKE ALL ON DATABASE $database FROM PUBLIC;"
        done
    } | psql --quiet --no-psqlrc -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres
}

create prefect "$PREFECT_DB_PASSWORD_FILE" prefect
create mlflow "$MLFLOW_DB_PASSWORD_FILE" mlflow mlflow_auth
