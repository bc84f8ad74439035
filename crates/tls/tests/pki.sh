#!/bin/sh
# Certificates for the tests: authorities "ours" and "other", and directories that are wrong in one way each.
set -e
umask 077
mkdir -p "$1" && cd "$1"
ec="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
authority() { # directory
    mkdir -p "$1"
    openssl req -x509 $ec -keyout "$1/ca-key.pem" -out "$1/ca-cert.pem" -subj "/CN=authority of $1" -days 30 \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
}
certificate() { # directory, end, use, names ("" for none), days
    openssl req $ec -keyout "$1/$2-key.pem" -out "$1/$2.csr" -subj "/C=GB/O=Disks/CN=$2.example"
    {
        [ -z "$4" ] || echo "subjectAltName=$4"
        echo "extendedKeyUsage=$3"
        echo "basicConstraints=critical,CA:FALSE"
        echo "keyUsage=critical,digitalSignature,keyEncipherment"
    } > "$1/ext"
    openssl x509 -req -in "$1/$2.csr" -CA "$1/ca-cert.pem" -CAkey "$1/ca-key.pem" -CAcreateserial -days "$5" \
        -extfile "$1/ext" -out "$1/$2-cert.pem"
}
both() { # directory
    certificate "$1" server serverAuth "DNS:localhost,IP:127.0.0.1" 30
    certificate "$1" client clientAuth "DNS:client.example" 30
}
authority ours; both ours
authority other; both other
mkdir bare; cp ours/ca-cert.pem bare
mkdir keyless; cp ours/ca-cert.pem ours/server-cert.pem keyless
cp -r ours junk; echo junk > junk/server-cert.pem
cp -r ours mixed; cp ours/client-key.pem mixed/server-key.pem
cp -r ours foreign; cp other/ca-cert.pem foreign
cp -r ours cn; certificate cn server serverAuth "" 30
cp -r ours expired
openssl x509 -req -in expired/server.csr -CA ours/ca-cert.pem -CAkey ours/ca-key.pem -CAcreateserial -days -1 \
    -extfile expired/ext -out expired/server-cert.pem 2> err || {
    # newer openssl refuses negative days
    openssl x509 -req -in expired/server.csr -CA ours/ca-cert.pem -CAkey ours/ca-key.pem -CAcreateserial \
        -not_before 20200101000000Z -not_after 20200102000000Z -extfile expired/ext -out expired/server-cert.pem
}
cp -r ours locked
openssl pkcs8 -topk8 -in ours/server-key.pem -out locked/server-key.pem -passout pass:sesame -v2 aes-256-cbc
cp -r ours revoking
touch index.txt; echo 01 > crlnumber
printf '[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\ncrlnumber=crlnumber\ndefault_md=sha256\ndefault_crl_days=30\n' > ca.cnf
openssl ca -config ca.cnf -cert ours/ca-cert.pem -keyfile ours/ca-key.pem -revoke ours/client-cert.pem
openssl ca -config ca.cnf -cert ours/ca-cert.pem -keyfile ours/ca-key.pem -gencrl -out revoking/ca-crl.pem
