#!/bin/sh
# The MLflow server: runs in PostgreSQL, artifacts in the object store, a password for everybody. libpq reads PGPASSWORD, boto3
# AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLflow MLFLOW_AUTH_ADMIN_PASSWORD: no secret stands in a command line or a file.
set -eu
: "${PGPASSWORD:?}" "${MLFLOW_AUTH_ADMIN_PASSWORD:?}" "${MLFLOW_FLASK_SERVER_SECRET_KEY:?}"
: "${AWS_ACCESS_KEY_ID:?}" "${AWS_SECRET_ACCESS_KEY:?}" "${MLFLOW_ALLOWED_HOSTS:?names and ports that clients call the server by}"
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # its job runners are some twenty processes that nothing here uses
exec mlflow server --host "${MLFLOW_HOST:-0.0.0.0}" --port "${MLFLOW_PORT:-5000}" --workers 2 \
  --app-name basic-auth \
  --allowed-hosts "$MLFLOW_ALLOWED_HOSTS" \
  --backend-store-uri postgresql+psycopg://mlflow@postgres/mlflow \
  --artifacts-destination s3://mlflow/artifacts
