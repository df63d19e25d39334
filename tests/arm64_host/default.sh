# Run in the folder of the checkout, on the emulated arm64 machine.
echo "pages of $(getconf PAGESIZE) bytes, Linux $(uname -rm), $(python3 --version)"
python3 -m pip --quiet install --root-user-action=ignore --break-system-packages \
    --no-build-isolation --no-deps --no-index .
result=0
dmaproof prove --guest bare || result=1
# With -v, a run that reaches its limit has already said which tests have failed.
python3 -m pytest -v tests/unit tests/property -n 2 --dist worksteal || result=1
exit $result
