# Run in the folder of the checkout, on the emulated arm64 machine.
echo "pages of $(getconf PAGESIZE) bytes, Linux $(uname -rm), $(python3 --version)"
python3 -m pip --quiet install --root-user-action=ignore --break-system-packages \
    --no-build-isolation --no-deps --no-index .
result=0
python3 -m pytest -q tests/unit tests/property -n 2 --dist worksteal || result=1
dmaproof prove --guest bare || result=1
exit $result
