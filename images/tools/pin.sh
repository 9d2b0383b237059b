#!/usr/bin/env bash
# Pin the images that are named to what the registry has, and compile the pipelines for them. In a release, where cosign is
# installed, each must carry the signature of this very tag's workflow: the registry's word alone is not enough.
set -euo pipefail
cd "$(dirname "$0")/../.."

python images/tools/image_tools.py pin "$@"
if type cosign &> /dev/null; then
    signer="https://github.com/$GITHUB_REPOSITORY/.github/workflows/publish-images.yml@$GITHUB_REF"
    python images/tools/image_tools.py show --pinned | while read -r reference; do
        cosign verify --certificate-oidc-issuer https://token.actions.githubusercontent.com \
            --certificate-identity "$signer" "$reference" > /dev/null
        echo "signed: $reference"
    done
fi
skd compile --release
