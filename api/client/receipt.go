package client

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
)

// ErrReceipt is what an answer fails with whose receipt is false or, where it must
// be there, missing. The answer is then not to be used: the reading may not be on
// record.
var ErrReceipt = errors.New("client: receipt")

// ended turns the end of a stream into nil.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// received looks at an answer's receipt.
func (c *Client) received(method string, header metadata.MD, a asked) error {
	v := header.Get("stopline-access-receipt")
	if len(v) == 0 {
		if a.must {
			return fmt.Errorf("%w: the answer to %s has none", ErrReceipt, method)
		}
		return nil
	}
	b, err := base64.StdEncoding.DecodeString(v[0])
	r := &pb.AccessReceipt{}
	if err == nil {
		err = proto.Unmarshal(b, r)
	}
	if err != nil {
		return fmt.Errorf("%w: cannot be read: %w", ErrReceipt, err)
	}
	if len(c.o.ReceiptKey) > 0 {
		if err := VerifyReceipt(c.o.District, c.o.ReceiptKey, r); err != nil {
			return err
		}
	}
	for _, to := range a.receipts {
		proto.Reset(to)
		proto.Merge(to, r)
	}
	if c.o.OnReceipt != nil {
		c.o.OnReceipt(method, r)
	}
	return nil
}

// VerifyReceipt checks a receipt against the key of a district's gateway.
func VerifyReceipt(district string, key ed25519.PublicKey, r *pb.AccessReceipt) error {
	if len(key) != ed25519.PublicKeySize {
		return fmt.Errorf("%w: the key has %d bytes, must have %d", ErrReceipt, len(key), ed25519.PublicKeySize)
	}
	h := sha256.Sum256(key)
	if id := hex.EncodeToString(h[:16]); r.KeyId != id {
		return fmt.Errorf("%w: key_id: is by %.32q, the gateway's key is %s", ErrReceipt, r.KeyId, id)
	}
	if len(r.Commitment) != sha256.Size {
		return fmt.Errorf("%w: commitment: has %d bytes, must have %d", ErrReceipt, len(r.Commitment), sha256.Size)
	}
	in := append([]byte("stopline access receipt v1\n"+district+"\n"), r.Commitment...)
	if !ed25519.Verify(key, binary.BigEndian.AppendUint64(in, uint64(r.TimeUnixNano)), r.Signature) {
		return fmt.Errorf("%w: signature: is not the gateway's", ErrReceipt)
	}
	return nil
}
