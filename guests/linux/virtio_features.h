// SPDX-License-Identifier: Apache-2.0
#ifndef DMAPROOF_VIRTIO_FEATURES_H
#define DMAPROOF_VIRTIO_FEATURES_H

// Report the features of each virtio device that its driver has accepted, as
// "virtio-TYPE features=BITS": TYPE has four hexadecimal digits.
void report_virtio_features(void);

#endif
