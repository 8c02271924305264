package payload

import (
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
)

// ScanClass calls f with the records of one class that are there, in the order
// of their indexes. It stops with f's error.
func (d *Disk) ScanClass(c retention.Class, f func(*ledger.Payload) error) error {
	d.mu.RLock()
	mixed, own := d.folders[retention.Mixed], d.folders[c]
	d.mu.RUnlock()
	if mixed != nil { // the older
		err := mixed.Scan(mixed.First(), func(_ uint64, rec []byte) error {
			p, err := ledger.ParsePayload(rec)
			if err != nil {
				return err
			}
			if in, err := ClassOf(p); err != nil || in != c {
				return err
			}
			return f(p)
		})
		if err != nil {
			return fmt.Errorf("payload store: %s: %w", retention.Mixed, err)
		}
	}
	if own == nil {
		return nil
	}
	err := own.Scan(own.First(), func(_ uint64, rec []byte) error {
		p, err := ledger.ParsePayload(rec)
		if err != nil || len(p.Envelope) == 0 {
			return err
		}
		return f(p)
	})
	if err != nil {
		return fmt.Errorf("payload store: %s: %w", c, err)
	}
	return nil
}
