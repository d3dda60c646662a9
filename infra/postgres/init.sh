#!/bin/sh
# Run once by the image, in an empty volume: a role and databases of its own for each service.
set -eu
psql --set=ON_ERROR_STOP=1 --set=mlflow="$MLFLOW_DB_PASSWORD" --set=airflow="$AIRFLOW_DB_PASSWORD" --username postgres <<'SQL'
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE ROLE airflow LOGIN PASSWORD :'airflow';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
CREATE DATABASE airflow OWNER airflow;
SQL
